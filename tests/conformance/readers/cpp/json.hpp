// JSON: parse, look up, write canonically. Numbers keep the text of the file, so that they can be written unchanged.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "hashes.hpp"

struct Rejected : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool holds, const std::string &what) {
    if (!holds) throw Rejected(what);
}

struct Json {
    enum Kind { NOTHING, BOOL, NUMBER, TEXT, LIST, OBJECT } kind = NOTHING;
    std::string text;  // of a text (UTF-8); of a number or bool as it stands in the file
    std::vector<Json> list;
    std::map<std::string, Json> object;  // byte order of UTF-8 is code point order

    static Json parse(View source) {
        Parser parser{source};
        Json value = parser.value(0);
        parser.space();
        require(parser.at == source.size(), "JSON: characters after the end");
        return value;
    }

    const Json &operator[](const std::string &name) const {
        auto found = object.find(name);
        require(kind == OBJECT && found != object.end(), "JSON: no field " + name);
        return found->second;
    }
    bool has(const std::string &name) const { return object.count(name) > 0; }
    const std::string &str() const {
        require(kind == TEXT, "JSON: not a text");
        return text;
    }
    const std::vector<Json> &items() const {
        require(kind == LIST, "JSON: not a list");
        return list;
    }
    long long integer() const {
        require(kind == NUMBER && text.size() < 19 && text.find_first_of(".eE") == text.npos, "JSON: not an integer");
        return std::stoll(text);
    }
    size_t count() const {
        require(integer() >= 0, "JSON: a negative number");
        return size_t(integer());
    }
    double number() const {
        require(kind == NUMBER, "JSON: not a number");
        return std::stod(text);
    }
    bool operator==(const Json &other) const { return canonical(true) == other.canonical(true); }

    // Canonical JSON; `ascii`: other characters as \uXXXX.
    std::string canonical(bool ascii = false) const {
        std::string out;
        if (kind == NOTHING) return "null";
        if (kind == NUMBER || kind == BOOL) return text;
        if (kind == TEXT) return quoted(text, ascii);
        if (kind == LIST) {
            for (const Json &item : list) out += (out.empty() ? "" : ",") + item.canonical(ascii);
            return "[" + out + "]";
        }
        for (const auto &[name, item] : object)
            out += (out.empty() ? "" : ",") + quoted(name, ascii) + ":" + item.canonical(ascii);
        return "{" + out + "}";
    }

    static std::string quoted(const std::string &text, bool ascii) {
        static const std::string shorts = "\"\\\b\f\n\r\t", letters = "\"\\bfnrt";
        auto unit = [](uint32_t code) {
            char escape[16];
            std::snprintf(escape, sizeof escape, "\\u%04x", code);
            return std::string(escape);
        };
        std::string out = "\"";
        for (size_t at = 0; at < text.size();) {
            unsigned char first = text[at];
            size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
            if (auto found = shorts.find(char(first)); found != shorts.npos) {
                out += std::string("\\") + letters[found];
            } else if (first < 0x20 || (ascii && first == 0x7f)) {
                out += unit(first);
            } else if (length == 1 || !ascii) {
                out += text.substr(at, length);
            } else {
                uint32_t code = first & (0xff >> (length + 1));
                for (size_t i = 1; i < length; i++) code = code << 6 | (text[at + i] & 0x3f);
                out += code < 0x10000 ? unit(code)
                                      : unit(0xd7c0 + (code >> 10)) + unit(0xdc00 + (code & 0x3ff));
            }
            at += length;
        }
        return out + "\"";
    }

private:
    struct Parser {
        View source;
        size_t at = 0;

        void space() {
            while (at < source.size() && View(" \t\r\n").find(source[at]) != View::npos) at++;
        }
        char next() {
            require(at < source.size(), "JSON: ends too early");
            return source[at++];
        }
        void word(View expected) {
            require(source.substr(at, expected.size()) == expected, "JSON: an unknown word");
            at += expected.size();
        }
        Json value(int depth) {
            require(depth < 100, "JSON: nested too deeply");
            space();
            Json out;
            char first = at < source.size() ? source[at] : ' ';
            if (first == '{' || first == '[') {
                bool object = first == '{';
                out.kind = object ? OBJECT : LIST;
                at++;
                space();
                if (at < source.size() && source[at] == (object ? '}' : ']')) return at++, out;
                for (char mark = ','; mark == ',';) {
                    if (object) {
                        space();
                        std::string name = text();
                        space();
                        require(next() == ':', "JSON: no colon");
                        out.object[name] = value(depth + 1);
                    } else {
                        out.list.push_back(value(depth + 1));
                    }
                    space();
                    mark = next();
                    require(mark == ',' || mark == (object ? '}' : ']'), "JSON: no comma");
                }
            } else if (first == '"') {
                out.kind = TEXT;
                out.text = text();
            } else if (first == 'n') {
                word("null");
            } else if (first == 't' || first == 'f') {
                out.kind = BOOL;
                out.text = first == 't' ? "true" : "false";
                word(out.text);
            } else {
                size_t start = at;
                while (at < source.size() && View("+-.0123456789eE").find(source[at]) != View::npos) at++;
                out.kind = NUMBER;
                out.text = source.substr(start, at - start);
                require(!out.text.empty(), "JSON: an unknown value");
            }
            return out;
        }
        uint32_t four() {
            require(at + 4 <= source.size(), "JSON: ends too early");
            at += 4;
            return uint32_t(std::stoul(std::string(source.substr(at - 4, 4)), nullptr, 16));
        }
        std::string text() {
            require(next() == '"', "JSON: no text");
            std::string out;
            for (char c = next(); c != '"'; c = next()) {
                if (c != '\\') {
                    out += c;
                    continue;
                }
                c = next();
                if (c != 'u') {
                    auto found = View("\"\\/bfnrt").find(c);
                    require(found != View::npos, "JSON: an unknown escape");
                    out += "\"\\/\b\f\n\r\t"[found];
                    continue;
                }
                uint32_t code = four();
                if (code >= 0xd800 && code < 0xdc00) {
                    word("\\u");
                    code = 0x10000 + ((code - 0xd800) << 10) + (four() - 0xdc00);
                }
                if (code < 0x80) {
                    out += char(code);
                } else if (code < 0x800) {
                    out += {char(0xc0 | code >> 6), char(0x80 | (code & 63))};
                } else if (code < 0x10000) {
                    out += {char(0xe0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
                } else {
                    out += {char(0xf0 | code >> 18), char(0x80 | (code >> 12 & 63)), char(0x80 | (code >> 6 & 63)),
                            char(0x80 | (code & 63))};
                }
            }
            return out;
        }
    };
};
