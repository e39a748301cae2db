// A reader of the cache format, written from docs/FORMAT.md: checks everything, then prints every record decoded.
//
//     g++ -std=c++17 -O1 -o reader reader.cpp -ldl
//     ./reader CACHE
//     ./reader --rows FILE      decodes the rows in a file of tests/golden
//
// Output and exit codes: tests/conformance/README.md. zstd and zlib are loaded where a cache needs them.
// For little-endian processors.

#include <cstdio>
#include <iostream>
#include <optional>
#include <set>

#include "codecs.hpp"
#include "images.hpp"
#include "shards.hpp"

const size_t MIB = 1 << 20, MAX_SHARD_BYTES = size_t(1) << 32;

struct Cache {
    fs::path root;
    Json manifest;
    std::vector<std::vector<Record>> views;

    const Json &fields() const { return manifest["fingerprint_fields"]; }
    bool has_shared_pixels() const { return fields().has("pixels"); }
};

void check_seal(const Bytes &file, const Json &manifest) {
    const std::string &seal = manifest["self_sha256"].str();
    Bytes blank = file;
    size_t at = blank.rfind(seal);
    require(seal.size() == 64 && at != blank.npos, "manifest.json has no self_sha256");
    require(sha256(blank.replace(at, 64, Bytes(64, '0'))) == seal, "manifest.json does not match its self_sha256");
}

// Values that the manifest holds twice.
void check_copies(const Json &manifest) {
    const Json &fields = manifest["fingerprint_fields"], &teacher = fields["teacher"];
    require(sha256(fields.canonical(true)) == manifest["fingerprint"].str(), "fingerprint differs from its fields");
    auto same = [](const Json &one, const Json &other, const char *what) {
        require(one == other, std::string("the manifest contradicts itself: ") + what);
    };
    same(manifest["codec"], fields["codec"], "codec");
    same(manifest["logit_codec"], fields["logit_codec"], "logit_codec");
    same(manifest["second_codec"], fields.has("second_codec") ? fields["second_codec"] : Json::parse("{}"), "second_codec");
    same(manifest["view_recipe"], fields["views"], "view_recipe");
    same(manifest["teacher"]["spec"], teacher, "teacher");
    same(manifest["codec"]["shape"], teacher["feature_shape"], "feature_shape");
    same(manifest["logit_codec"]["num_classes"], teacher["num_classes"], "num_classes");
    for (const auto &[name, value] : fields["data"].object) same(manifest["data"][name], value, "data");
    require(sha256(manifest["class_names"].canonical()) == fields["data"]["class_names"].str(), "class_names differ");
    bool pooled = teacher.has("pooled");
    require(pooled == !manifest["second_codec"].object.empty(), "the manifest contradicts itself: pooled");
    if (pooled) {
        require(manifest["second_codec"]["shape"].canonical() == "[" + teacher["pooled"].text + ",1,1]", "pooled differs");
        require(manifest["second_codec"]["id"].str() != "transform", "an unknown codec of pooled embeddings");
    }
    require(!fields.has("pixels") || (fields["pixels"].str() == "shared" && !manifest["pixels_from"].object.empty()),
            "the manifest contradicts itself: pixels_from");
    if (fields.has("features_every")) {
        size_t every = fields["features_every"].count();
        require(every >= 2 && manifest["logit_codec"]["id"].str() != "logits-recomputed", "features_every is not valid");
        for (const Json &group : manifest["groups"].items())
            require(group.items().size() % every == 0, "features_every does not divide the views of a group");
    }
}

void check_units(const Json &manifest) {
    require(sha256(manifest["units"].canonical()) == manifest["units_digest"].str(), "units_digest differs");
    std::vector<size_t> sums(manifest["groups"].items().size()), ranges(sums.size());
    size_t last = 0;
    for (const Json &unit : manifest["units"].items()) {
        size_t group = unit.items().at(0).count(), count = unit.items().at(2).count();
        require(group < sums.size() && group >= last && count <= 65536, "a row of units is not valid");
        require(unit.items()[1].count() == ranges[group]++, "the ranges of a group are not 0, 1, ...");
        sums[group] += count;
        last = group;
    }
    for (size_t sum : sums) require(sum == manifest["num_samples"].count(), "num_samples is not the sum of the units");
    std::set<size_t> views;
    size_t listed = 0;
    for (const Json &group : manifest["groups"].items())
        for (const Json &view : group.items()) views.insert(view.count()), listed++;
    require(listed == manifest["num_views"].count() && views.size() == listed && (!listed || *views.rbegin() == listed - 1),
            "groups do not hold every view once");
}

Json read_manifest(const fs::path &root) {
    Bytes file = read_file(root / "manifest.json", 64 * MIB);
    Json manifest = Json::parse(file);
    require(manifest["format_version"].canonical() == "2", "an unknown format_version");
    check_seal(file, manifest);
    check_copies(manifest);
    check_units(manifest);
    return manifest;
}

// A file of tensors with the hash that the manifest has of it.
Bytes hashed_file(const fs::path &path, const std::string &hash) {
    Bytes data = read_file(path, MAX_SHARD_BYTES);
    require(sha256(data) == hash, path.filename().string() + " differs from its sha256 in the manifest");
    return data;
}

bool is_key(const std::string &key) {
    bool ends = key.empty() || key.front() == '/' || key.back() == '/' || key.find("//") != key.npos;
    for (unsigned char c : key) ends = ends || c <= 32 || c == 127 || c == '.' || c == '\\';
    return !ends && key.size() <= 1024;
}

// The sidecar of a unit, after every file that it names was compared with its hash; the unit's keys.
std::vector<std::string> check_unit(const Cache &cache, const fs::path &folder, const Json &row) {
    Bytes sidecar = read_file(folder / "unit.json", 32 * MIB);
    require(sha256(sidecar) == row.items().at(3).str(), "unit.json differs from its sha256 in the manifest");
    Json unit = Json::parse(sidecar);
    size_t group = row.items()[0].count(), count = row.items()[2].count();
    require(unit["format"].integer() == 2 && unit["fingerprint"] == cache.manifest["fingerprint"] &&
                unit["backend"] == cache.manifest["backend"] && unit["group"].count() == group &&
                unit["range_id"] == row.items()[1] && unit["views"] == cache.manifest["groups"].items()[group],
            "unit.json does not belong to this cache or place");
    require(unit["count"].count() == count &&
                count + unit["skipped"].items().size() + unit["start"].count() == unit["stop"].count(),
            "unit.json has another count");
    for (const auto &[name, fact] : unit["files"].object) {
        require(name.find("..") == name.npos && name.front() != '/', "unit.json names a file outside of the unit");
        size_t bytes = fact["bytes"].count();
        Bytes data = read_file(folder / name, bytes);
        require(data.size() == bytes && sha256(data) == fact["sha256"].str(), name + " differs from its hash in unit.json");
    }
    std::vector<std::string> keys;
    std::string line;
    for (char c : read_file(folder / "keys.txt", MAX_SHARD_BYTES)) {
        if (c != '\n') {
            line += c;
            continue;
        }
        require(is_key(line), "a key is not valid: " + line);
        keys.push_back(line);
        line.clear();
    }
    require(keys.size() == count && line.empty(), "keys.txt has another number of lines than the unit");
    return keys;
}

void check_record(const Cache &cache, const Record &record, size_t row, size_t view) {
    auto rule = [&](bool holds, const char *what) { require(holds, "record " + record.key + ": " + what); };
    const Json &manifest = cache.manifest, &recipe = manifest["view_recipe"];
    rule(record.flags >= 0 && record.flags < 16, "an unknown flag");
    const bool parts[] = {record.label.has_value(), !record.features.empty(), !record.logits.empty(), !record.second.empty()};
    for (int i = 0; i < 4; i++) rule(parts[i] == bool(record.flags & 1 << i), "the flags do not match the parts");
    size_t classes = manifest["class_names"].items().size();
    size_t every = cache.fields().has("features_every") ? cache.fields()["features_every"].count() : 1;
    rule(parts[0] == (classes > 0) && (!parts[0] || (*record.label >= 0 && size_t(*record.label) < classes)),
         "the label is not one of class_names");
    rule(parts[1] == ((row + row / every + view) % every == 0), "features are there or absent against the rule");
    rule(parts[2] == LogitCodec(manifest["logit_codec"]).stored(), "logits are there or absent against the rule");
    rule(parts[3] == !manifest["second_codec"].object.empty(), "the pooled embedding is there or absent against the rule");
    rule(record.digest.size() == 16 && Json::parse(record.view)["number"].count() == view, "the view has another number");
    bool baked = recipe["pixels"].str() == "baked" && !cache.has_shared_pixels();
    rule(record.pixels.empty() == !baked, "pixels are there or absent against the rule");
    if (!baked) return;
    Size size = image_size(record.pixels, recipe["pixel_format"].str());
    rule(size == Size(recipe["size"].count(), recipe["size"].count()), "the image has another size than the recipe");
    if (recipe["pixel_format"].str() != "png") return;  // other formats need a decoder
    std::string shape = std::to_string(size.second) + "," + std::to_string(size.first) + ",3;";
    rule(blake2b8(shape + png_pixels(record.pixels, size)) == record.digest, "the pixels differ from their digest");
}

Cache read_cache(const fs::path &root);

// Compares every record with that of the cache that holds the pixels.
void check_shared_pixels(const Cache &cache) {
    const Json &from = cache.manifest["pixels_from"];
    Cache other = read_cache(cache.root / from["path"].str());
    Json parts = Json::parse("{}");
    parts.object = {{"data", other.fields()["data"]}, {"views", other.fields()["views"]}};
    require(sha256(parts.canonical(true)) == from["identity"].str(), "the pixels are those of another cache");
    require(!other.has_shared_pixels(), "the cache of the pixels holds none");
    require(cache.manifest["num_samples"] == other.manifest["num_samples"] && cache.views.size() <= other.views.size(),
            "the cache of the pixels holds other images");
    for (size_t view = 0; view < cache.views.size(); view++)
        for (size_t row = 0; row < cache.views[view].size(); row++) {
            const Record &one = cache.views[view][row], &two = other.views[view][row];
            require(one.key == two.key && one.label == two.label && one.view == two.view && one.digest == two.digest,
                    "record " + one.key + " differs from the one with its pixels");
        }
}

Cache read_cache(const fs::path &root) {
    Cache cache{root, read_manifest(root), {}};
    const Json &manifest = cache.manifest, &groups = manifest["groups"];
    std::string backend = manifest["backend"].str();
    require(backend == "webdataset" || backend == "zarr", "an unknown backend");
    if (!manifest["tail_sha256"].str().empty()) hashed_file(root / "tail.safetensors", manifest["tail_sha256"].str());
    if (manifest["teacher"].has("held_out_sha256"))
        hashed_file(root / "heldout.safetensors", manifest["teacher"]["held_out_sha256"].str());
    cache.views.resize(manifest["num_views"].count());
    std::vector<std::set<std::string>> images(groups.items().size());
    for (const Json &unit : manifest["units"].items()) {
        size_t group = unit.items()[0].count(), range = unit.items()[1].count();
        char name[64];
        std::snprintf(name, sizeof name, "g%03zu-r%05zu", group, range);
        fs::path folder = root / "units" / name;
        std::vector<std::string> keys = check_unit(cache, folder, unit);
        images[group].insert(keys.begin(), keys.end());
        for (const Json &view : groups.items()[group].items()) {
            std::snprintf(name, sizeof name, "v%04zu", view.count());
            auto read = backend == "zarr" ? read_zarr : read_tar;
            std::vector<Record> records = read(folder / name, {group, range, view.count()}, keys, MAX_SHARD_BYTES);
            for (size_t row = 0; row < records.size(); row++) check_record(cache, records[row], row, view.count());
            auto &all = cache.views[view.count()];
            all.insert(all.end(), records.begin(), records.end());
        }
    }
    for (const auto &keys : images)
        require(keys == images[0] && keys.size() == manifest["num_samples"].count(), "groups hold other images");
    if (cache.has_shared_pixels()) check_shared_pixels(cache);
    return cache;
}

std::string printed(const Floats &values) {
    if (values.empty()) return "null";
    return "\"" + hex(View(reinterpret_cast<const char *>(values.data()), 4 * values.size())) + "\"";
}

void print_cache(const Cache &cache) {
    const Json &manifest = cache.manifest, &codec_config = manifest["codec"], &logit_config = manifest["logit_codec"];
    Tensors state, classifier;
    if (codec_config["id"].str() == "transform")
        state = read_safetensors(hashed_file(cache.root / "codec.safetensors", codec_config["state_sha256"].str()));
    if (logit_config["id"].str() == "logits-recomputed")
        classifier = read_safetensors(hashed_file(cache.root / "classifier.safetensors", logit_config["sha256"].str()));
    FeatureCodec codec(codec_config, state);
    LogitCodec logit_codec(logit_config);
    std::optional<FeatureCodec> second_codec;
    if (!manifest["second_codec"].object.empty()) second_codec.emplace(manifest["second_codec"], Tensors());
    std::string out = "{";
    for (const char *name : {"num_samples", "num_views", "class_names", "fingerprint"})
        out += std::string(out == "{" ? "" : ",") + "\"" + name + "\":" + manifest[name].canonical();
    out += "}\n";
    for (const auto &view : cache.views)
        for (const Record &record : view) {
            Floats map, norms, logits, second;
            if (!record.features.empty()) std::tie(map, norms) = codec.decode(record.features);
            if (!record.logits.empty()) logits = logit_codec.decode(record.logits);
            if (!map.empty() && !classifier.empty()) logits = recomputed_logits(classifier, map, codec.channels);
            if (second_codec) second = second_codec->decode(record.second).first;
            require_finite(map, "features");
            require_finite(norms, "norms");
            require_finite(second, "pooled embeddings");
            out += "{\"key\":" + Json::quoted(record.key, false);
            out += ",\"label\":" + (record.label ? std::to_string(*record.label) : "null");
            out += ",\"view\":" + record.view + ",\"digest\":" + Json::quoted(record.digest, false);
            out += ",\"pixels\":" + (record.pixels.empty() ? "null" : "\"" + sha256(record.pixels) + "\"");
            out += ",\"features\":" + printed(map) + ",\"norms\":" + printed(norms);
            out += ",\"logits\":" + printed(logits) + ",\"second\":" + printed(second) + "}\n";
        }
    std::cout << out;
}

Bytes unhex(const std::string &text) {
    Bytes out;
    for (size_t at = 0; at + 1 < text.size(); at += 2) out += char(std::stoi(text.substr(at, 2), nullptr, 16));
    return out;
}

// One object of tests/golden: a codec's configuration and rows -> one line per decoded row.
void print_rows(const Json &golden) {
    const Json &config = golden["config"], &rows = golden[golden.has("records") ? "records" : "rows"];
    bool logits = config["id"].str().substr(0, 6) == "logits";
    Tensors state;
    if (golden.has("state")) state = read_safetensors(unhex(golden["state"].str()));
    std::optional<FeatureCodec> codec;
    if (!logits) codec.emplace(config, state);
    for (const Json &row : rows.items()) {
        Floats values = logits ? LogitCodec(config).decode(unhex(row["record"].str())) : codec->decode(unhex(row.str())).first;
        std::cout << printed(values) << "\n";
    }
}

int main(int count, char **words) {
    try {
        if (count == 2) {
            print_cache(read_cache(words[1]));
        } else if (count == 3 && words[1] == std::string("--rows")) {
            Json golden = Json::parse(read_file(words[2], MIB));
            if (golden.has("config")) print_rows(golden);
            if (!golden.has("config"))
                for (const auto &[name, one] : golden.object) print_rows(one);
        } else {
            return std::cerr << "usage: reader CACHE, or: reader --rows FILE\n", 2;
        }
    } catch (const Unsupported &problem) {
        return std::cerr << problem.what() << "\n", 3;
    } catch (const std::exception &problem) {
        return std::cerr << "rejected: " << problem.what() << "\n", 1;
    }
}
