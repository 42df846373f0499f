"""Pictures: sets of them on disk, pairs of them in reports, how alike two are."""
