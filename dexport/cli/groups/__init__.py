"""Option groups: what commands take, each under its heading and as one value."""
