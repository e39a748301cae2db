// sha256 (FIPS 180-4), blake2b (RFC 7693) and crc32c of byte strings.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

using Bytes = std::string;
using View = std::string_view;

inline std::string hex(View data) {
    std::string text;
    for (unsigned char byte : data) {
        text += "0123456789abcdef"[byte >> 4];
        text += "0123456789abcdef"[byte & 15];
    }
    return text;
}

// A little-endian number or float at `at`; the caller has checked the length.
template <class T>
T little(View data, size_t at) {
    T value;
    std::memcpy(&value, data.data() + at, sizeof value);
    return value;
}

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
inline const std::array<uint32_t, 64> SHA256_ROUNDS = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline std::string sha256(View data) {
    auto turn = [](uint32_t x, int by) { return x >> by | x << (32 - by); };
    std::array<uint32_t, 8> state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    Bytes padded(data);
    padded += '\x80';
    while (padded.size() % 64 != 56) padded += '\0';
    for (int shift = 56; shift >= 0; shift -= 8) padded += char(uint64_t(data.size()) * 8 >> shift);
    for (size_t block = 0; block < padded.size(); block += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; i++) w[i] = __builtin_bswap32(little<uint32_t>(padded, block + 4 * i));
        for (int i = 16; i < 64; i++) {
            uint32_t s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (int i = 0; i < 64; i++) {
            uint32_t s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
            uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + SHA256_ROUNDS[i] + w[i];
            uint32_t s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
            uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; i++) state[i] += sums[i];
    }
    Bytes digest;
    for (uint32_t word : state)
        for (int shift = 24; shift >= 0; shift -= 8) digest += char(word >> shift);
    return hex(digest);
}

// blake2b without a key and with a digest of 8 bytes, as hex.
inline std::string blake2b8(View data) {
    static const uint64_t IV[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                   0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static const uint8_t SIGMA[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    auto turn = [](uint64_t x, int by) { return x >> by | x << (64 - by); };
    uint64_t state[8];
    for (int i = 0; i < 8; i++) state[i] = IV[i];
    state[0] ^= 0x01010000 ^ 8;
    size_t blocks = data.empty() ? 1 : (data.size() + 127) / 128;
    for (size_t block = 0; block < blocks; block++) {
        uint64_t m[16] = {}, v[16];
        size_t done = std::min(data.size(), 128 * (block + 1));
        if (done > 128 * block) std::memcpy(m, data.data() + 128 * block, done - 128 * block);
        for (int i = 0; i < 8; i++) v[i] = state[i], v[i + 8] = IV[i];
        v[12] ^= done;
        if (block + 1 == blocks) v[14] = ~v[14];
        for (int round = 0; round < 12; round++) {
            const uint8_t *s = SIGMA[round % 10];
            auto mix = [&](int a, int b, int c, int d, int at) {
                v[a] += v[b] + m[s[at]];
                v[d] = turn(v[d] ^ v[a], 32);
                v[c] += v[d];
                v[b] = turn(v[b] ^ v[c], 24);
                v[a] += v[b] + m[s[at + 1]];
                v[d] = turn(v[d] ^ v[a], 16);
                v[c] += v[d];
                v[b] = turn(v[b] ^ v[c], 63);
            };
            for (int i = 0; i < 4; i++) mix(i, 4 + i, 8 + i, 12 + i, 2 * i);
            for (int i = 0; i < 4; i++) mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, 8 + 2 * i);
        }
        for (int i = 0; i < 8; i++) state[i] ^= v[i] ^ v[i + 8];
    }
    return hex(View(reinterpret_cast<char *>(state), 8));
}

inline uint32_t crc32c(View data) {
    static const auto table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < 256; i++) {
            made[i] = i;
            for (int bit = 0; bit < 8; bit++) made[i] = made[i] >> 1 ^ (made[i] & 1 ? 0x82f63b78 : 0);
        }
        return made;
    }();
    uint32_t crc = ~0u;
    for (unsigned char byte : data) crc = crc >> 8 ^ table[(crc ^ byte) & 255];
    return ~crc;
}
