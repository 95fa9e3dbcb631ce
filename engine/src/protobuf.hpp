// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "error.hpp"

namespace featherweight {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers are read from files as they stand, which is right on little-endian processors only"
#endif

struct Bytes {
    const std::byte* data = nullptr;
    std::size_t size = 0;
};

// Walks over the fields of one protobuf message. Whoever wants a nested message makes a Message of its bytes, so that depth
// is what the caller's code has and never what a file asks for. Nothing outside the bytes is read: every length is held
// against what is left before it is believed. Throws Error where the bytes are no protobuf, or a field is not of the kind
// that is asked for.
class Message {
public:
    explicit Message(Bytes bytes) : at_(bytes.data), end_(bytes.data + bytes.size) {}

    // Goes to the next field; false at the end. Fields that nobody asks for are thereby skipped.
    bool next() {
        if (at_ == end_) return false;
        const std::uint64_t tag = varint(at_, end_);
        if (tag >> 3 == 0 || tag >> 3 >= 1u << 29) damaged("a field's number is out of range");
        field_ = static_cast<int>(tag >> 3);
        kind_ = static_cast<Kind>(tag & 7);
        switch (kind_) {
            case Kind::varint: number_ = varint(at_, end_); return true;
            case Kind::fixed64: value_ = take(8); return true;
            case Kind::fixed32: value_ = take(4); return true;
            case Kind::bytes: value_ = take(varint(at_, end_)); return true;
        }
        damaged("it holds a group or an unknown kind of field, and ONNX has neither");
    }

    int field() const { return field_; }

    std::int64_t integer() const {
        expect(Kind::varint);
        return static_cast<std::int64_t>(number_);
    }
    float real() const {
        expect(Kind::fixed32);
        return as<float>(value_.data);
    }
    Bytes bytes() const {
        expect(Kind::bytes);
        return value_;
    }
    // Text goes into messages and to Python: it is UTF-8 without zeros.
    std::string_view text() const {
        const Bytes held = bytes();
        const std::string_view made(reinterpret_cast<const char*>(held.data), held.size);
        if (!is_text(made)) damaged("a name is not UTF-8 text");
        return made;
    }

    // Every number of a repeated field, packed or not: `take` is called with each.
    template <class Take> void each_integer(Take take) const {
        if (kind_ == Kind::varint) return take(integer());
        const Bytes packed = bytes();
        const std::byte* const end = packed.data + packed.size;
        for (const std::byte* at = packed.data; at != end;) take(static_cast<std::int64_t>(varint(at, end)));
    }
    // The same of float or double.
    template <class T, class Take> void each_real(Take take) const {
        constexpr Kind single = sizeof(T) == 4 ? Kind::fixed32 : Kind::fixed64;
        if (kind_ == single) return take(as<T>(value_.data));
        const Bytes packed = bytes();
        if (packed.size % sizeof(T) != 0) damaged("a list of numbers ends within one");
        for (std::size_t i = 0; i < packed.size; i += sizeof(T)) take(as<T>(packed.data + i));
    }

    static bool is_text(std::string_view text) {
        for (std::size_t i = 0; i < text.size();) {
            const auto byte = [&](std::size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
            const unsigned lead = byte(i);
            const int more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
            if (lead == 0 || (lead >= 0x80 && lead < 0xc2) || lead > 0xf4) return false;
            for (int k = 1; k <= more; ++k)
                if ((byte(i + k) & 0xc0) != 0x80) return false;
            const unsigned second = byte(i + 1);  // overlong forms, surrogates, and what lies beyond Unicode
            if ((lead == 0xe0 && second < 0xa0) || (lead == 0xed && second >= 0xa0) || (lead == 0xf0 && second < 0x90) ||
                (lead == 0xf4 && second >= 0x90))
                return false;
            i += static_cast<std::size_t>(more) + 1;
        }
        return true;
    }

    [[noreturn]] static void damaged(const char* what) {
        throw Error(std::string("this is no ONNX file, or it is damaged: ") + what);
    }

private:
    enum class Kind : std::uint8_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

    static std::uint64_t varint(const std::byte*& at, const std::byte* end) {
        std::uint64_t number = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (at == end) damaged("it ends within a number");
            const auto byte = std::to_integer<std::uint64_t>(*at++);
            if (shift == 63 && byte > 1) break;
            number |= (byte & 0x7f) << shift;
            if (byte < 0x80) return number;
        }
        damaged("a number is longer than 64 bits");
    }

    Bytes take(std::uint64_t size) {
        if (size > static_cast<std::uint64_t>(end_ - at_)) damaged("a field goes beyond the end of what holds it");
        const Bytes made{at_, static_cast<std::size_t>(size)};
        at_ += size;
        return made;
    }

    template <class T> static T as(const std::byte* data) {
        T made;
        std::memcpy(&made, data, sizeof(T));
        return made;
    }

    void expect(Kind kind) const {
        if (kind_ != kind) damaged("a field is of another kind than ONNX has there");
    }

    const std::byte* at_;
    const std::byte* end_;
    int field_ = 0;
    Kind kind_ = Kind::varint;
    std::uint64_t number_ = 0;
    Bytes value_;
};

}  // namespace featherweight
