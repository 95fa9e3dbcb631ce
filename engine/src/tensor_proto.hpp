// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "file.hpp"
#include "protobuf.hpp"
#include "tensor.hpp"

namespace featherweight {

// Where a model's tensors lie: in its own bytes, or in files beside it.
class Storage {
public:
    // `folder`: of external data; "" where there is none. `read`: is told which of the model's bytes are not needed again.
    Storage(std::string folder, std::function<void(Bytes)> read) : folder_(std::move(folder)), read_(std::move(read)) {}

    // A TensorProto's elements. Room is made once the bytes for it are known to be there. Throws Error where they do not fit
    // what the tensor says of itself, and Unsupported for element types that the engine cannot hold.
    Tensor tensor(Bytes message);

private:
    void copy(Bytes from, std::byte* to) const;
    const File& file(const std::string& location);

    std::string folder_;
    std::function<void(Bytes)> read_;
    std::string location_;  // of the file that is open: one at a time, as a model may have one a tensor
    std::unique_ptr<File> file_;
};

}  // namespace featherweight
