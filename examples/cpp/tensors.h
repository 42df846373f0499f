// Tensors as raw files: FOLDER/NAME.raw holds the values of one tensor, as numpy's tofile() writes them.
#pragma once

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

inline std::vector<char> read_raw(const std::string& folder, const std::string& name, std::size_t bytes) {
    const std::string path = folder + "/" + name + ".raw";
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw std::runtime_error(path + " cannot be read");
    const auto size = static_cast<std::size_t>(file.tellg());
    if (size != bytes) {
        throw std::runtime_error(path + " has " + std::to_string(size) + " bytes, expected " + std::to_string(bytes));
    }
    std::vector<char> content(bytes);
    file.seekg(0);
    if (!file.read(content.data(), static_cast<std::streamsize>(bytes))) throw std::runtime_error(path + " cannot be read");
    return content;
}

inline void write_raw(const std::string& folder, const std::string& name, const void* data, std::size_t bytes) {
    const std::string path = folder + "/" + name + ".raw";
    std::ofstream file(path, std::ios::binary);
    if (!file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes)) || !file.flush()) {
        throw std::runtime_error(path + " cannot be written");
    }
}

// The number of values of a shape.
inline std::size_t volume(const std::vector<std::int64_t>& shape) {
    std::size_t values = 1;
    for (const auto size : shape) values *= static_cast<std::size_t>(size);
    return values;
}

inline std::int64_t parse_batch(const std::string& text) {
    std::size_t used = 0;
    const std::int64_t batch = std::stoll(text, &used);
    if (used != text.size() || batch < 1) throw std::invalid_argument(text + " is no batch: give 1 or more");
    return batch;
}
