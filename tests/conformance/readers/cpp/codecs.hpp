// Decodes rows of the feature codecs and records of the logit codecs to float32.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "transform.hpp"

using Floats = std::vector<float>;

inline float half(View data, size_t number, size_t start = 0) {
    uint16_t bits = little<uint16_t>(data, start + 2 * number);
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                : std::ldexp(float(exponent ? 1024 + mantissa : mantissa), std::max(exponent, 1) - 25);
    return bits >> 15 ? -size : size;
}

inline float e4m3(uint8_t bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    if ((bits & 127) == 127) size = NAN;
    return bits >> 7 ? -size : size;
}

inline void require_finite(const Floats &values, const char *what) {
    for (float value : values) require(std::isfinite(value), std::string(what) + " are not finite");
}

struct FeatureCodec {
    std::string id;
    size_t channels, height, width;
    std::optional<Transform> transform;

    FeatureCodec(const Json &config, const Tensors &state) : id(config["id"].str()) {
        const auto &shape = config["shape"].items();
        require(shape.size() == 3, "a codec's shape is not [C, H, W]");
        channels = shape[0].count(), height = shape[1].count(), width = shape[2].count();
        require(channels && height && width && channels * height * width < 1u << 28, "a codec's shape is too large");
        long long version = id == "float16" || id == "bfloat16" ? 2 : 1;
        require(config["version"].integer() == version, "an unknown version of codec " + id);
        if (id == "transform") transform.emplace(config, state, channels, height, width);
    }

    // A row -> the map (C, H, W) and the stored norms (2, H, W); no norms for float32.
    std::pair<Floats, Floats> decode(View row) const {
        if (transform) return transform->decode(row);
        size_t tokens = height * width, count = tokens * channels, groups = (channels + 127) / 128;
        size_t scales = 2 * channels, codes = scales + 2 * tokens * groups;
        auto bytes = [&](size_t values) {
            require(row.size() == values + (id == "float32" ? 0 : 4 * tokens), "a row of codec " + id + " has another length");
            return values;
        };
        Floats map(count), norms;
        auto store = [&](auto value) {  // token-major to channel-major
            for (size_t token = 0; token < tokens; token++)
                for (size_t c = 0; c < channels; c++) map[c * tokens + token] = value(token, c, token * channels + c);
        };
        auto scaled = [&](auto code) {
            store([&](size_t token, size_t c, size_t at) {
                return half(row, c) + float(code(at)) * half(row, token * groups + c / 128, scales);
            });
        };
        size_t end = 0;
        if (id == "float32") {
            end = bytes(4 * count);
            store([&](size_t, size_t, size_t at) { return little<float>(row, 4 * at); });
        } else if (id == "float16") {
            end = bytes(scales + 2 * count);
            store([&](size_t, size_t c, size_t at) { return half(row, c) + half(row, at, scales); });
        } else if (id == "bfloat16") {
            end = bytes(scales + 2 * count);
            store([&](size_t, size_t c, size_t at) {
                uint32_t bits = uint32_t(little<uint16_t>(row, scales + 2 * at)) << 16;
                return half(row, c) + little<float>(View(reinterpret_cast<char *>(&bits), 4), 0);
            });
        } else if (id == "int8") {
            end = bytes(codes + count);
            scaled([&](size_t at) { return int8_t(row[codes + at]); });
        } else if (id == "fp8") {
            end = bytes(codes + count);
            scaled([&](size_t at) { return e4m3(uint8_t(row[codes + at])); });
        } else if (id == "int4") {
            end = bytes(codes + (count + 1) / 2);
            scaled([&](size_t at) { return (uint8_t(row[codes + at / 2]) >> (at % 2 ? 4 : 0) & 15) - 8; });
        } else {
            throw Rejected("an unknown codec, " + id);
        }
        for (size_t at = 0; end < row.size() && at < 2 * tokens; at++) norms.push_back(half(row, at, end));
        return {map, norms};
    }
};

// Rounded to float32, within its finite values.
inline float limited(double value) {
    const double limit = std::numeric_limits<float>::max();
    return float(std::max(-limit, std::min(limit, value)));
}

struct LogitCodec {
    std::string id;
    size_t classes, k;

    explicit LogitCodec(const Json &config)
        : id(config["id"].str()), classes(config["num_classes"].count()), k(config.has("k") ? config["k"].count() : 0) {
        require(config["version"].integer() == 1, "an unknown version of codec " + id);
        require(id == "logits-int8" || id == "logits-top-k" || id == "logits-recomputed", "an unknown codec, " + id);
    }
    bool stored() const { return classes > 0 && id != "logits-recomputed"; }

    Floats decode(View record) const {
        auto length = [&](size_t expected) {
            require(record.size() == expected, "a record of codec " + id + " has another length");
        };
        Floats out(classes, -INFINITY);
        if (id == "logits-top-k") {
            length(8 * k);
            for (size_t i = 0; i < k; i++) {
                uint32_t number = little<uint32_t>(record, 4 * i);
                require(number < classes, "a class of the logits is beyond the number of classes");
                out[number] = little<float>(record, 4 * k + 4 * i);
                require(std::isfinite(out[number]), "logits are not finite");
            }
            return out;
        }
        require(record.size() >= 5, "a record of codec " + id + " has another length");
        double largest = little<float>(record, 1);
        require(std::isfinite(largest), "logits are not finite");
        if (record[0] == 0) {
            length(9 + classes);
            double step = little<float>(record, 5);
            require(std::isfinite(step), "logits are not finite");
            for (size_t i = 0; i < classes; i++) out[i] = limited(largest - step * uint8_t(record[9 + i]));
        } else if (record[0] == 1) {
            length(5 + 2 * classes);
            for (size_t i = 0; i < classes; i++) {
                require(std::isfinite(half(record, i, 5)), "logits are not finite");
                out[i] = limited(largest - half(record, i, 5));
            }
        } else {
            require(record[0] == 2, "an unknown mode of logits");
            length(5 + 4 * classes);
            for (size_t i = 0; i < classes; i++) out[i] = little<float>(record, 5 + 4 * i);
        }
        require_finite(out, "logits");
        return out;
    }
};

// Logits of `logits-recomputed`: the classifier on the mean of a decoded map over positions.
inline Floats recomputed_logits(const Tensors &classifier, const Floats &map, size_t channels) {
    const auto &weight = classifier.at("weight"), &bias = classifier.at("bias");
    require(weight.data.size() == 4 * bias.count() * channels, "the classifier does not fit the map");
    size_t tokens = map.size() / channels;
    Floats out;
    for (size_t k = 0; k < bias.count(); k++) {
        double sum = little<float>(bias.data, 4 * k);
        for (size_t c = 0; c < channels; c++) {
            double mean = 0;
            for (size_t token = 0; token < tokens; token++) mean += map[c * tokens + token];
            sum += mean / double(tokens) * little<float>(weight.data, 4 * (k * channels + c));
        }
        out.push_back(float(sum));
    }
    return out;
}
