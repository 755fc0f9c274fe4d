// Runs one launch in a process of its own, where a sanitizer can watch it: driver <launch> <result>.
//
//   launch:  kernel, signature, geometry; the count of buffers, and of each its lead and its bytes; the count of
//            arguments, and of each a buffer's number and an offset into it, or VALUE and the value's bytes
//   result:  the outcome and its text; the bytes of each buffer
//
// Numbers have 64 bits; strings and bytes follow their length. A buffer begins `lead` bytes after an address that is a
// multiple of ALIGNMENT and ends with the memory allocated, so that a kernel's pointers are as aligned as they were and
// whatever is read or written outside of them is seen.
#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

extern "C" int run_kernel(const char*, const char*, const unsigned (&)[7], const void* const*, char*, size_t);

constexpr uint64_t VALUE = ~0ull;
constexpr size_t ALIGNMENT = 64;

struct Buffer {
    char* begin;
    uint64_t size;
};

[[noreturn]] void fail(const char* what) {
    perror(what);
    exit(2);
}

void read(FILE* from, void* to, size_t size) {
    if (fread(to, 1, size, from) != size) fail("reading a launch");
}

uint64_t read_number(FILE* from) {
    uint64_t number;
    read(from, &number, sizeof(number));
    return number;
}

std::string read_bytes(FILE* from) {
    std::string bytes(read_number(from), '\0');
    read(from, bytes.data(), bytes.size());
    return bytes;
}

Buffer read_buffer(FILE* from) {
    const uint64_t lead = read_number(from), size = read_number(from);
    void* memory = nullptr;
    if (posix_memalign(&memory, ALIGNMENT, lead + size)) fail("memory for a buffer");
    char* begin = static_cast<char*>(memory) + lead;
    read(from, begin, size);
    ASAN_POISON_MEMORY_REGION(memory, lead);
    return {begin, size};
}

// A value's bytes, or those of an address.
std::string read_argument(FILE* from, const std::vector<Buffer>& buffers) {
    const uint64_t buffer = read_number(from);
    if (buffer == VALUE) return read_bytes(from);
    const char* address = buffers.at(buffer).begin + read_number(from);
    return {reinterpret_cast<const char*>(&address), sizeof(address)};
}

void write(FILE* to, const void* bytes, size_t size) {
    if (fwrite(bytes, 1, size, to) != size) fail("writing a result");
}

void write_bytes(FILE* to, const char* bytes, uint64_t size) {
    write(to, &size, sizeof(size));
    write(to, bytes, size);
}

int main(int, char** paths) {
    FILE* from = fopen(paths[1], "rb");
    if (from == nullptr) fail(paths[1]);
    const std::string kernel = read_bytes(from), signature = read_bytes(from), words = read_bytes(from);
    std::vector<Buffer> buffers(read_number(from));
    for (Buffer& buffer : buffers) buffer = read_buffer(from);
    std::vector<std::string> values(read_number(from));
    for (std::string& value : values) value = read_argument(from, buffers);

    std::vector<const void*> arguments;
    for (const std::string& value : values) arguments.push_back(value.data());
    unsigned geometry[7];
    memcpy(geometry, words.data(), sizeof(geometry));
    char text[1024] = "";
    const uint64_t outcome =
        run_kernel(kernel.c_str(), signature.c_str(), geometry, arguments.data(), text, sizeof(text));

    FILE* to = fopen(paths[2], "wb");
    if (to == nullptr) fail(paths[2]);
    write(to, &outcome, sizeof(outcome));
    write_bytes(to, text, strlen(text));
    for (const Buffer& buffer : buffers) write_bytes(to, buffer.begin, buffer.size);
    if (fclose(to) != 0) fail(paths[2]);
}
