// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "protobuf.hpp"

namespace featherweight {

// A regular file that is open for reading.
class File {
public:
    explicit File(const std::string& path);  // throws Error
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    std::uint64_t size() const { return size_; }
    void read(std::uint64_t offset, std::byte* into, std::size_t bytes) const;  // throws Error where it has fewer

private:
    friend class Mapping;
    std::string path_;
    int handle_ = -1;
    std::uint64_t size_ = 0;
};

// A whole file as memory that the system fills as it is read.
class Mapping {
public:
    explicit Mapping(const File& file);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    Bytes bytes() const { return bytes_; }
    // These have been read and need no memory any longer. They may be read again all the same.
    void drop(Bytes part) const;

private:
    Bytes bytes_;
};

}  // namespace featherweight
