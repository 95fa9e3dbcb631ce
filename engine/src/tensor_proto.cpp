// SPDX-License-Identifier: Apache-2.0
#include "tensor_proto.hpp"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>
#include <optional>

namespace featherweight {

namespace {

// The numbers of TensorProto's fields.
enum Field { dims = 1, data_type = 2, float_data = 4, int32_data = 5, int64_data = 7, raw_data = 9, double_data = 10, uint64_data = 11,
             external_data = 13, data_location = 14 };

// What a tensor says of itself, and how many elements it holds in fields of numbers.
struct Header {
    Dims sizes;
    std::int64_t type = 0;
    std::optional<Bytes> raw;
    bool external = false;
    std::map<std::string, std::string, std::less<>> place;  // of external data
    std::map<int, std::int64_t> numbers;                    // elements, by field
};

Header header_of(Bytes bytes) {
    Header made;
    for (Message message(bytes); message.next();) {
        const int field = message.field();
        std::int64_t numbers = 0;
        const auto one = [&](auto) { ++numbers; };
        switch (field) {
            case dims:
                message.each_integer([&](std::int64_t size) {
                    if (made.sizes.size() == most_axes) throw Unsupported("it has more than " + std::to_string(most_axes) + " axes");
                    made.sizes.push_back(size);
                });
                break;
            case data_type: made.type = message.integer(); break;
            case raw_data: made.raw = message.bytes(); break;
            case data_location: made.external = message.integer() == 1; break;
            case float_data: message.each_real<float>(one); break;
            case double_data: message.each_real<double>(one); break;
            case int32_data:
            case int64_data:
            case uint64_data: message.each_integer(one); break;
            case external_data: {
                std::string key, value;
                for (Message entry(message.bytes()); entry.next();) {
                    if (entry.field() == 1) key = entry.text();
                    if (entry.field() == 2) value = entry.text();
                }
                made.place[key] = value;
                break;
            }
            default: break;
        }
        if (numbers > 0) made.numbers[field] += numbers;
    }
    return made;
}

int field_of(Type type) {
    switch (type) {
        case Type::f32: return float_data;
        case Type::f64: return double_data;
        case Type::i64: return int64_data;
        case Type::u32:
        case Type::u64: return uint64_data;
        default: return int32_data;  // of the 16-bit floats the bits
    }
}

template <class T> void fill(Bytes bytes, const Tensor& tensor) {
    const int field = field_of(tensor.type);
    auto* at = reinterpret_cast<T*>(tensor.bytes());
    T* const end = at + tensor.size();
    const auto put = [&](auto number) {
        if (at == end) Message::damaged("it was changed while it was read");
        *at++ = static_cast<T>(number);
    };
    for (Message message(bytes); message.next();) {
        if (message.field() != field) continue;
        if constexpr (std::is_floating_point_v<T>)
            message.each_real<T>(put);
        else
            message.each_integer(put);
    }
}

void fill(Bytes bytes, const Tensor& tensor) {
    switch (tensor.type) {
        case Type::f32: return fill<float>(bytes, tensor);
        case Type::f64: return fill<double>(bytes, tensor);
        default: break;
    }
    switch (size_of(tensor.type)) {
        case 1: return fill<std::uint8_t>(bytes, tensor);
        case 2: return fill<std::uint16_t>(bytes, tensor);
        case 4: return fill<std::uint32_t>(bytes, tensor);
        default: return fill<std::uint64_t>(bytes, tensor);
    }
}

std::uint64_t number_of(const Header& header, const char* key, std::uint64_t otherwise) {
    const auto found = header.place.find(key);
    if (found == header.place.end()) return otherwise;
    const std::string& text = found->second;
    std::uint64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size() || text.empty())
        throw Error(std::string("the ") + key + " of its external data is no number: '" + text + "'");
    return number;
}

}  // namespace

const File& Storage::file(const std::string& location) {
    namespace fs = std::filesystem;
    if (file_ && location_ == location) return *file_;
    const std::string where = "its elements lie in '" + location + "'";
    if (folder_.empty()) throw Error(where + ", and models given as bytes have no folder to look in; name one, or give the model's path");
    const fs::path path(location);
    if (location.empty() || path.is_absolute() || std::find(path.begin(), path.end(), fs::path("..")) != path.end())
        throw Error(where + ", which is no path below the model's own folder");
    std::error_code error;
    const fs::path base = fs::canonical(folder_, error);
    if (error) throw Error(where + ", and the folder '" + folder_ + "' is not there");
    const fs::path target = fs::canonical(base / path, error);
    if (error) throw Error(where + ", which is not there in '" + folder_ + "'");
    // A link may lead anywhere: what counts is where it ends.
    if (std::mismatch(base.begin(), base.end(), target.begin(), target.end()).first != base.end())
        throw Error(where + ", a link that leads out of the model's folder; put the file itself there");
    file_ = std::make_unique<File>(target.string());
    location_ = location;
    return *file_;
}

// In pieces, so that a large tensor is never in memory twice as a whole.
void Storage::copy(Bytes from, std::byte* to) const {
    constexpr std::size_t piece = std::size_t{4} << 20;
    for (std::size_t at = 0; at < from.size; at += piece) {
        const std::size_t bytes = std::min(piece, from.size - at);
        std::memcpy(to + at, from.data + at, bytes);
        read_({from.data + at, bytes});
    }
}

Tensor Storage::tensor(Bytes message) {
    const Header header = header_of(message);
    const Type type = from_onnx(header.type);
    const std::string what = std::string(name_of(type)) + " of shape " + describe(header.sizes);
    const std::int64_t size = count(header.sizes);
    const std::uint64_t bytes = static_cast<std::uint64_t>(size) * size_of(type);
    const auto held = header.numbers.find(field_of(type));
    const std::int64_t numbers = held == header.numbers.end() ? 0 : held->second;

    Tensor made;
    if (header.external) {
        const auto location = header.place.find("location");
        if (location == header.place.end()) throw Error("its elements lie in another file, and it does not say in which");
        const std::uint64_t offset = number_of(header, "offset", 0);
        if (number_of(header, "length", bytes) != bytes) throw Error("the length of its external data is not that of " + what);
        const File& from = file(location->second);
        if (offset > from.size() || bytes > from.size() - offset)
            throw Error("'" + location->second + "' ends before its elements do: " + what + " at byte " + std::to_string(offset));
        made = Tensor(type, header.sizes);
        from.read(offset, made.bytes(), bytes);
    } else if (header.raw) {
        if (header.raw->size != bytes || numbers != 0)
            throw Error(std::to_string(header.raw->size) + " bytes are held for " + what + ", which takes " + std::to_string(bytes));
        made = Tensor(type, header.sizes);
        copy(*header.raw, made.bytes());
    } else {
        if (numbers != size) throw Error(std::to_string(numbers) + " elements are held for " + what);
        made = Tensor(type, header.sizes);
        fill(message, made);
        read_(message);
    }
    if (type == Type::boolean)  // a byte that is neither 0 nor 1 is no bool to a compiler
        for (std::int64_t i = 0; i < size; ++i) made.bytes()[i] = std::byte{made.bytes()[i] != std::byte{0}};
    return made;
}

}  // namespace featherweight
