// Records of one shard: a tar with its index, or a zarr group.
#pragma once

#include <filesystem>
#include <fstream>
#include <optional>

#include "libraries.hpp"

namespace fs = std::filesystem;

enum Part : long long { LABEL = 1, FEATURES = 2, LOGITS = 4, SECOND = 8 };

struct Record {
    std::string key, view, digest;
    std::optional<long long> label;
    long long flags = 0;
    Bytes pixels, features, second, logits;
};

struct Place {
    size_t group, range, view;
};

inline Bytes read_file(const fs::path &path, size_t limit) {
    require(fs::is_regular_file(path), path.string() + " is missing");
    size_t size = fs::file_size(path);
    require(size <= limit, path.string() + " is too long");
    Bytes data(size, '\0');
    std::ifstream stream(path, std::ios::binary);
    stream.read(data.data(), std::streamsize(size));
    require(size_t(stream.gcount()) == size, path.string() + " cannot be read");
    return data;
}

inline View slice(View data, size_t start, size_t size) {
    require(start <= data.size() && size <= data.size() - start, "a range beyond the end of a file");
    return data.substr(start, size);
}

// The JSON of a record: digest, flags and the view, which is stored verbatim between `"view":` and the last `}`.
inline Json read_target(const Bytes &text, Record &record) {
    Json target = Json::parse(text);
    record.digest = target["digest"].str();
    record.flags = target["flags"].integer();
    size_t start = text.find("\"view\":");
    require(start != text.npos && text.back() == '}', "a record without a view");
    record.view = text.substr(start + 7, text.size() - start - 8);
    return target;
}

inline size_t second_bytes(const Json &target) {
    return target.has("second_bytes") ? target["second_bytes"].count() : 0;
}

inline std::vector<Record> read_tar(const fs::path &stem, Place place, const std::vector<std::string> &keys, size_t limit) {
    Bytes tar = read_file(fs::path(stem) += ".tar", limit), index = read_file(fs::path(stem) += ".idx", limit);
    require(index.size() >= 48 && index.substr(0, 8) == "SKDCIDX2", "a file that is not an index");
    const uint64_t header[] = {48, 40, place.group, place.range, place.view, 0};
    for (int i = 0; i < 6; i++)
        require(little<uint32_t>(index, 8 + 4 * i) == header[i], "the header of an index does not match its place");
    require(little<uint64_t>(index, 32) == keys.size() && index.size() == 48 + 40 * keys.size(),
            "an index has another number of records than the unit");
    require(little<uint64_t>(index, 40) == tar.size(), "a tar has another length than its index says");
    std::vector<Record> records;
    size_t last = 0;
    for (size_t number = 0; number < keys.size(); number++) {
        View row = View(index).substr(48 + 40 * number, 40);
        size_t at[3], bytes[3];
        for (int i = 0; i < 3; i++) at[i] = little<uint64_t>(row, 8 * i), bytes[i] = little<uint32_t>(row, 24 + 4 * i);
        for (int i = 0; i < 3; i++) {
            if (i == 1 && !bytes[1]) continue;  // no pixels
            require(at[i] >= last, "members of a tar overlap");
            slice(tar, at[i], bytes[i]);
            last = at[i] + bytes[i];
        }
        Bytes covered = keys[number] + Bytes(row.substr(0, 36)) + tar.substr(at[0], last - at[0]);
        require(crc32c(covered) == little<uint32_t>(row, 36), "the checksum of record " + keys[number] + " differs");
        Record record;
        record.key = keys[number];
        Json target = read_target(tar.substr(at[0], bytes[0]), record);
        if (target.has("label")) record.label = target["label"].integer();
        record.pixels = tar.substr(at[1], bytes[1]);
        View member = View(tar).substr(at[2], bytes[2]);
        size_t first = target["features_bytes"].count(), second = second_bytes(target);
        record.features = slice(member, 0, first);
        record.second = slice(member, first, second);
        record.logits = member.substr(first + second);
        records.push_back(record);
    }
    return records;
}

// An array of a zarr group, whole.
inline Bytes read_array(const fs::path &folder, bool flat, const std::string &type, size_t limit) {
    Json meta = Json::parse(read_file(folder / "zarr.json", 1 << 20));
    require(meta["zarr_format"].integer() == 3 && meta["data_type"].str() == type, "an array of another type");
    require(meta["shape"].items().size() == 1 && meta["codecs"].items().size() == 1, "an array of another form");
    const Json &sharding = meta["codecs"].items()[0], &inner = sharding["configuration"];
    require(sharding["name"].str() == "sharding_indexed" && inner["index_location"].str() == "end" &&
                inner["codecs"].items().size() == 2 && inner["codecs"].items()[0]["name"].str() == "bytes" &&
                inner["codecs"].items()[1]["name"].str() == (flat ? "crc32c" : "zstd"),
            "an array with other codecs");
    size_t item = type == "uint8" ? 1 : type == "uint32" ? 4 : 8;
    size_t length = meta["shape"].items()[0].count() * item;
    size_t shard = meta["chunk_grid"]["configuration"]["chunk_shape"].items().at(0).count() * item;
    size_t chunk = inner["chunk_shape"].items().at(0).count() * item;
    require(chunk > 0 && chunk <= 1 << 26 && shard % chunk == 0 && shard / chunk <= 1 << 20 && length <= limit,
            "an array with chunks of another size");
    Bytes out;
    for (size_t number = 0; number * shard < length; number++) {
        Bytes file = read_file(folder / "c" / std::to_string(number), limit);
        size_t pairs = shard / chunk;
        require(pairs <= file.size() / 16 && file.size() >= 16 * pairs + 4, "a shard file is too short");
        View index = View(file).substr(file.size() - 16 * pairs - 4);
        require(crc32c(index.substr(0, 16 * pairs)) == little<uint32_t>(index, 16 * pairs), "the index of a shard file differs");
        for (size_t i = 0; i < pairs && out.size() < length; i++) {
            View stored = slice(file, little<uint64_t>(index, 16 * i), little<uint64_t>(index, 16 * i + 8));
            if (!flat) {
                out += unzstd(stored, chunk);
                continue;
            }
            require(stored.size() == chunk + 4, "a chunk has another length");
            require(crc32c(stored.substr(0, chunk)) == little<uint32_t>(stored, chunk), "the checksum of a chunk differs");
            out += stored.substr(0, chunk);
        }
    }
    out.resize(length);
    return out;
}

inline std::vector<Record> read_zarr(const fs::path &stem, Place place, const std::vector<std::string> &keys, size_t limit) {
    fs::path root = fs::path(stem) += ".zarr";
    Json attributes = Json::parse(read_file(root / "zarr.json", 1 << 20))["attributes"];
    require(attributes["scalekd_cache"].integer() == 2 && attributes["group"].count() == place.group &&
                attributes["range_id"].count() == place.range && attributes["view"].count() == place.view,
            "the attributes of a zarr group do not match its place");
    std::map<std::string, Bytes> arrays;
    auto array = [&](const std::string &name, bool flat, const char *type, size_t bytes) {
        arrays[name] = read_array(root / name, flat, type, limit);
        require(flat || arrays[name].size() == bytes, "an array has another length than the unit: " + name);
    };
    array("labels", false, "int64", 8 * keys.size());
    array("crc32c", false, "uint32", 4 * keys.size());
    for (std::string name : {"features", "pixels", "target", "logits"}) {
        array(name, true, "uint8", 0);
        array(name + "_offsets", false, "uint64", 8 * (keys.size() + 1));
    }
    auto part = [&](const std::string &name, size_t number) {
        size_t start = little<uint64_t>(arrays[name + "_offsets"], 8 * number);
        size_t stop = little<uint64_t>(arrays[name + "_offsets"], 8 * number + 8);
        require(start <= stop, "offsets that do not rise");
        return Bytes(slice(arrays[name], start, stop - start));
    };
    std::vector<Record> records;
    for (size_t number = 0; number < keys.size(); number++) {
        Record record;
        record.key = keys[number];
        Json target = read_target(part("target", number), record);
        Bytes label = arrays["labels"].substr(8 * number, 8), features = part("features", number);
        record.pixels = part("pixels", number);
        record.logits = part("logits", number);
        size_t second = second_bytes(target);
        require(second <= features.size(), "a range beyond the end of a record");
        record.features = features.substr(0, features.size() - second);
        record.second = features.substr(features.size() - second);
        if (record.flags & LABEL) {
            record.label = little<int64_t>(label, 0);
        } else {
            require(label == Bytes(8, '\0'), "a record without a label has one");
            label.clear();
        }
        Bytes covered;
        auto cover = [&](const Bytes &field) {
            uint32_t bytes = uint32_t(field.size());
            covered += Bytes(reinterpret_cast<char *>(&bytes), 4) + field;
        };
        for (const Bytes &field : {record.key, label, record.view, record.digest, record.pixels, record.features}) cover(field);
        if (!record.second.empty()) cover(record.second);
        cover(record.logits);
        require(crc32c(covered) == little<uint32_t>(arrays["crc32c"], 4 * number),
                "the checksum of record " + record.key + " differs");
        records.push_back(record);
    }
    return records;
}
