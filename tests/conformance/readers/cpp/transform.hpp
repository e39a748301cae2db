// Safetensors files, and records of codec `transform`.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libraries.hpp"

struct Tensor {
    std::string dtype;
    std::vector<size_t> shape;
    Bytes data;

    size_t count() const { return std::accumulate(shape.begin(), shape.end(), size_t(1), std::multiplies<>()); }
    double at(size_t number) const {
        if (dtype == "F32") return little<float>(data, 4 * number);
        if (dtype == "I32") return little<int32_t>(data, 4 * number);
        return int8_t(data[number]);
    }
};

using Tensors = std::map<std::string, Tensor>;

// A safetensors file: length of its header (uint64), the header (JSON), the data.
inline Tensors read_safetensors(View file) {
    require(file.size() >= 8 && little<uint64_t>(file, 0) <= file.size() - 8, "a damaged safetensors file");
    size_t length = little<uint64_t>(file, 0);
    Tensors tensors;
    View data = file.substr(8 + length);
    for (const auto &[name, entry] : Json::parse(file.substr(8, length)).object) {
        if (name == "__metadata__") continue;
        Tensor tensor{entry["dtype"].str(), {}, {}};
        for (const Json &size : entry["shape"].items()) tensor.shape.push_back(size.count());
        size_t start = entry["data_offsets"].items().at(0).count(), stop = entry["data_offsets"].items().at(1).count();
        require(start <= stop && stop <= data.size(), "a damaged safetensors file");
        tensor.data = data.substr(start, stop - start);
        size_t bytes = tensor.dtype == "I8" ? 1 : 4;
        if (tensor.dtype == "F32" || tensor.dtype == "I32" || tensor.dtype == "I8")
            require(tensor.data.size() == bytes * tensor.count(), "a damaged safetensors file");
        tensors.emplace(name, tensor);
    }
    return tensors;
}

float half(View data, size_t number, size_t start);

class Transform {
    size_t channels, height, width, tokens, factors;
    bool rotated;
    double step;
    Tensors state;
    std::vector<double> levels;

    const Tensor &tensor(const char *name, const char *dtype, std::vector<size_t> shape) const {
        auto found = state.find(name);
        require(found != state.end() && found->second.dtype == dtype && found->second.shape == shape,
                std::string("codec.safetensors: tensor ") + name + " is missing or has another shape");
        return found->second;
    }

    std::vector<double> symbols(View plane) const {
        std::vector<double> out;
        size_t start = 0;
        const Tensor &segments = state.at("segments");
        for (size_t row = 0; row < segments.shape[0]; row++) {
            size_t count = size_t(segments.at(2 * row)), bits = size_t(segments.at(2 * row + 1));
            size_t bytes = (count * bits + 7) / 8;
            require(start + bytes <= plane.size(), "a plane of codec transform has another length");
            for (size_t j = 0; j < count; j++) {
                if (bits == 16) {
                    out.push_back(uint8_t(plane[start + j]) + 256 * int8_t(plane[start + count + j]));
                } else if (bits == 8) {
                    out.push_back(int8_t(plane[start + j]));
                } else {
                    int code = uint8_t(plane[start + j % bytes]) >> bits * (j / bytes) & ((1 << bits) - 1);
                    out.push_back(code - (1 << (bits - 1)));
                }
            }
            start += bytes;
        }
        size_t escapes = escape_count();
        require(plane.size() == start + 6 * escapes, "a plane of codec transform has another length");
        for (size_t i = 0; i < escapes; i++) {
            int place = std::clamp(little<int32_t>(plane, start + 4 * i), 0, int(out.size()) - 1);
            out[size_t(place)] += little<int16_t>(plane, start + 4 * escapes + 2 * i);
        }
        return out;
    }

    size_t symbol_count() const { return tokens * (channels + factors); }
    size_t escape_count() const { return std::min(symbol_count(), std::max<size_t>(64, symbol_count() / 32)); }

    size_t plane_bytes() const {
        size_t sum = 6 * escape_count(), count = 0;
        const Tensor &segments = state.at("segments");
        for (size_t row = 0; row < segments.shape[0]; row++) {
            size_t symbols = size_t(segments.at(2 * row));
            count += symbols;
            sum += (symbols * size_t(segments.at(2 * row + 1)) + 7) / 8;
        }
        require(count == symbol_count(), "codec.safetensors: segments of another number of symbols");
        return sum;
    }

    // The levels in the table's order: those of k by m(k + 1).
    static std::vector<double> dither_table(size_t period) {
        std::vector<std::pair<uint32_t, size_t>> mixed;
        for (size_t k = 0; k < period; k++) {
            uint32_t v = uint32_t(k + 1);
            v = (v ^ v >> 16) * 0x7feb352d;
            v = (v ^ v >> 15) * 0x2c1b3c6d;
            mixed.emplace_back(v ^ v >> 16, k);
        }
        std::sort(mixed.begin(), mixed.end());  // by value, then by k: as a stable sort does
        std::vector<double> levels;
        for (auto [value, k] : mixed) levels.push_back((double(k) + 0.5) / double(period) - 0.5);
        return levels;
    }

    // Orthonormal DCT-II: the value at position x of frequency f.
    static double wave(size_t f, size_t x, size_t size) {
        return std::sqrt((f ? 2.0 : 1.0) / double(size)) * std::cos(M_PI * (double(x) + 0.5) * double(f) / double(size));
    }

public:
    Transform(const Json &config, const Tensors &tensors, size_t c, size_t h, size_t w)
        : channels(c), height(h), width(w), tokens(h * w), factors(0), rotated(config["channels"].str() == "rotated"),
          step(std::sqrt(12 * config["noise"].number() / double(c))), state(tensors) {
        require(rotated || config["channels"].str() == "predicted", "an unknown mode of codec transform");
        require(state.count("bands") && state.at("bands").shape.size() == 1, "codec.safetensors: no tensor bands");
        require(state.count("loadings") && state.at("loadings").shape.size() == 3, "codec.safetensors: no loadings");
        require(state.count("segments") && state.at("segments").shape.size() == 2, "codec.safetensors: no segments");
        size_t bands = state.at("bands").shape[0];
        factors = state.at("loadings").shape[1];
        require(rotated == (factors == 0), "codec.safetensors: factors of another mode");
        size_t components = rotated ? channels : 0, places = 0;
        tensor("mean", "F32", {channels});
        tensor("frequencies", "I32", {tokens});
        tensor("bands", "I32", {bands});
        tensor("basis", "F32", {bands, components, channels});
        tensor("loadings", "I8", {bands, factors, channels});
        tensor("units", "F32", {bands, channels});
        tensor("order", "I32", {tokens * (components + factors)});
        for (size_t band = 0; band < bands; band++) places += size_t(state.at("bands").at(band));
        require(places == tokens, "codec.safetensors: bands of another number of places");
        size_t period = 1 << 16;
        while (period < tokens * channels) period *= 2;
        levels = dither_table(period);
    }

    std::pair<std::vector<float>, std::vector<float>> decode(View record) const {
        require(record.size() > 8 + 4 * tokens, "a record of codec transform is too short");
        std::vector<float> norms, map(channels * tokens);
        for (size_t i = 0; i < 2 * tokens; i++) norms.push_back(half(record, i, 8));
        std::vector<double> symbol = symbols(unzstd(record.substr(8 + 4 * tokens), plane_bytes()));
        size_t seed = little<uint32_t>(record, 0);
        const Tensor &order = state.at("order"), &basis = state.at("basis"), &bands = state.at("bands");
        const Tensor &loadings = state.at("loadings"), &units = state.at("units");
        size_t first = tokens * factors, band = 0, end = size_t(bands.at(0));
        std::vector<double> values(channels * tokens), factor(first), spectrum(channels * tokens);
        for (size_t i = 0; i < first; i++) factor.at(size_t(order.at(i))) = symbol[i];
        for (size_t i = 0; i < channels * tokens; i++)
            values.at(rotated ? size_t(order.at(i)) : i) =
                std::ldexp(symbol[first + i] - levels[(seed + i) % levels.size()], uint8_t(record[4]));
        for (size_t place = 0; place < tokens; place++) {
            while (place >= end) end += size_t(bands.at(++band));
            size_t frequency = size_t(state.at("frequencies").at(place));
            for (size_t c = 0; c < channels; c++) {
                double sum = 0;
                if (rotated) {
                    for (size_t p = 0; p < channels; p++)
                        sum += values[place * channels + p] * basis.at((band * channels + p) * channels + c);
                } else {
                    for (size_t r = 0; r < factors; r++)
                        sum += factor[place * factors + r] * loadings.at((band * factors + r) * channels + c);
                    sum = values[place * channels + c] + units.at(band * channels + c) * sum;
                }
                if (place == 0) sum += state.at("mean").at(c) * std::sqrt(double(tokens)) / step;
                spectrum.at(frequency * channels + c) = sum;
            }
        }
        for (size_t token = 0; token < tokens; token++) {
            double scale = step * std::max(double(norms[tokens + token]), norms[token] / 64.0);
            for (size_t c = 0; c < channels; c++) {
                double sum = 0;
                for (size_t f = 0; f < tokens; f++)
                    sum += spectrum[f * channels + c] * wave(f / width, token / width, height) *
                           wave(f % width, token % width, width);
                map[c * tokens + token] = float(sum * scale);
            }
        }
        return {map, norms};
    }
};
