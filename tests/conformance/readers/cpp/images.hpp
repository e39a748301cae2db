// Image files: the size in the header of JPEG, WebP and PNG; the pixels of PNG.
#pragma once

#include <cstdlib>
#include <utility>

#include "libraries.hpp"

using Size = std::pair<size_t, size_t>;  // width, height

inline size_t big(View data, size_t at, int bytes) {
    require(at + bytes <= data.size(), "an image file ends too early");
    size_t value = 0;
    for (int i = 0; i < bytes; i++) value = value << 8 | uint8_t(data[at + i]);
    return value;
}

inline Size jpeg_size(View data) {
    for (size_t at = 2;; at += 2 + big(data, at + 2, 2)) {
        size_t marker = big(data, at, 2);
        require(marker >> 8 == 0xff && marker != 0xffda, "a JPEG file without a frame header");
        if (marker >= 0xffc0 && marker <= 0xffc3) {
            require(big(data, at + 4, 1) == 8 && big(data, at + 9, 1) == 3, "a JPEG file that is not RGB with 8 bits");
            return {big(data, at + 7, 2), big(data, at + 5, 2)};
        }
    }
}

// The size of an image file, whose format must be that of the recipe.
inline Size image_size(View data, const std::string &format) {
    if (data.substr(0, 2) == "\xff\xd8" && format.substr(0, 4) == "jpeg") return jpeg_size(data);
    if (data.substr(0, 4) == "RIFF" && format == "webp") {
        require(data.size() > 30 && data.substr(8, 8) == "WEBPVP8 " && data.substr(23, 3) == "\x9d\x01\x2a",
                "a WebP file that is not one lossy key frame");
        return {little<uint16_t>(data, 26) & 0x3fff, little<uint16_t>(data, 28) & 0x3fff};
    }
    require(data.substr(0, 4) == "\x89PNG" && format == "png", "an image file of another format than the recipe");
    require(big(data, 24, 2) == 0x0802 && big(data, 28, 1) == 0, "a PNG file that is not RGB with 8 bits");
    return {big(data, 16, 4), big(data, 20, 4)};
}

// The pixels of a PNG file: rows of RGB bytes.
inline Bytes png_pixels(View data, Size size) {
    Bytes packed;
    for (size_t at = 8; at < data.size();) {
        size_t length = big(data, at, 4);
        big(data, at + 8, 0);
        if (data.substr(at + 4, 4) == "IDAT") packed += data.substr(at + 8, length);
        at += length + 12;
    }
    size_t stride = 3 * size.first;
    Bytes lines = unzlib(packed, (stride + 1) * size.second), out;
    for (size_t y = 0; y < size.second; y++) {
        int filter = lines[y * (stride + 1)];
        for (size_t x = 0; x < stride; x++) {
            int left = x < 3 ? 0 : uint8_t(out[y * stride + x - 3]);
            int above = y == 0 ? 0 : uint8_t(out[(y - 1) * stride + x]);
            int corner = x < 3 || y == 0 ? 0 : uint8_t(out[(y - 1) * stride + x - 3]);
            int p = left + above - corner, a = std::abs(p - left), b = std::abs(p - above), c = std::abs(p - corner);
            int paeth = a <= b && a <= c ? left : b <= c ? above : corner;
            const int guess[] = {0, left, above, (left + above) / 2, paeth};
            require(filter >= 0 && filter < 5, "a damaged PNG file");
            out += char(lines[y * (stride + 1) + 1 + x] + guess[filter]);
        }
    }
    return out;
}
