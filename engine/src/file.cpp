// SPDX-License-Identifier: Apache-2.0
#include "file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace featherweight {

namespace {

[[noreturn]] void failed(const std::string& path, const char* what) {
    throw Error("'" + path + "' cannot be " + what + ": " + std::strerror(errno));
}

}  // namespace

File::File(const std::string& path) : path_(path) {
    handle_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe of that name must not make us wait
    if (handle_ < 0) failed(path, "opened");
    struct stat facts {};
    const bool known = fstat(handle_, &facts) == 0;
    if (!known || !S_ISREG(facts.st_mode)) {
        close(handle_);
        throw Error("'" + path + "' is no regular file");
    }
    size_ = static_cast<std::uint64_t>(facts.st_size);
}

File::~File() { close(handle_); }

void File::read(std::uint64_t offset, std::byte* into, std::size_t bytes) const {
    while (bytes > 0) {
        const std::size_t most = std::min<std::size_t>(bytes, std::size_t{1} << 30);
        const ssize_t got = pread(handle_, into, most, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) failed(path_, "read");
        if (got == 0) throw Error("'" + path_ + "' ends sooner than it should");
        offset += static_cast<std::uint64_t>(got);
        into += got;
        bytes -= static_cast<std::size_t>(got);
    }
}

Mapping::Mapping(const File& file) {
    if (file.size() == 0) return;
    void* data = mmap(nullptr, file.size(), PROT_READ, MAP_PRIVATE, file.handle_, 0);
    if (data == MAP_FAILED) failed(file.path_, "mapped into memory");
    bytes_ = {static_cast<const std::byte*>(data), static_cast<std::size_t>(file.size())};
}

Mapping::~Mapping() {
    if (bytes_.data != nullptr) munmap(const_cast<std::byte*>(bytes_.data), bytes_.size);
}

void Mapping::drop(Bytes part) const {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const auto begin = static_cast<std::size_t>(part.data - bytes_.data);
    const std::size_t first = (begin + page - 1) / page * page, last = (begin + part.size) / page * page;
    if (first < last) madvise(const_cast<std::byte*>(bytes_.data) + first, last - first, MADV_DONTNEED);
}

}  // namespace featherweight
