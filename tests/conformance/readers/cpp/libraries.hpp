// zstd and zlib, loaded when a cache needs them: their headers need not be installed.
#pragma once

#include <dlfcn.h>

#include "json.hpp"

struct Library {
    void *handle;
    Library(const char *need, std::vector<const char *> names) : handle(nullptr) {
        for (const char *name : names)
            if (!handle) handle = dlopen(name, RTLD_NOW);
        if (!handle) throw Unsupported(std::string(need) + " needs the shared library " + names[0]);
    }
    template <class F>
    F *get(const char *name) const {
        return reinterpret_cast<F *>(dlsym(handle, name));
    }
};

// A zstd frame that declares `size` bytes, decoded.
inline Bytes unzstd(View frame, size_t size) {
    static const Library zstd("a zarr cache or codec transform", {"libzstd.so.1", "libzstd.1.dylib"});
    static auto *declared = zstd.get<unsigned long long(const void *, size_t)>("ZSTD_getFrameContentSize");
    static auto *decompress = zstd.get<size_t(void *, size_t, const void *, size_t)>("ZSTD_decompress");
    require(declared(frame.data(), frame.size()) == size, "a zstd frame declares another size");
    Bytes out(size, '\0');
    require(decompress(out.data(), size, frame.data(), frame.size()) == size, "a damaged zstd frame");
    return out;
}

// A zlib stream of `size` bytes, decoded.
inline Bytes unzlib(View stream, size_t size) {
    static const Library zlib("the digest of a PNG file", {"libz.so.1", "libz.dylib"});
    static auto *decompress = zlib.get<int(void *, unsigned long *, const void *, unsigned long)>("uncompress");
    Bytes out(size, '\0');
    unsigned long found = size;
    require(decompress(out.data(), &found, stream.data(), stream.size()) == 0 && found == size, "a damaged PNG file");
    return out;
}
