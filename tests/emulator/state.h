// The inside of the machine: shared by its parts, unknown to kernels.
#pragma once

#include <setjmp.h>

#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    size_t size;
    const void* pc;
};

struct Access {  // to shared memory, for the count of bank conflicts
    const void* pc;
    uint32_t offset, size;
};

enum class Wait { none, block, warp, done };

struct Fiber {
    jmp_buf context;
    unsigned char* stack = nullptr;
    bool alive = false;   // has a context that can be continued
    bool waited = false;  // for the kernel before this one

    unsigned thread = 0;
    Wait wait = Wait::done;
    const char* name = nullptr;  // of the collective it waits at
    Site site = {};
    void* arguments = nullptr;
    Body body = nullptr;

    uint32_t warp_epoch = 0;  // barriers of the warp that it has passed
    std::vector<Copy> open;   // the group under way
    std::deque<std::vector<Copy>> groups;
    std::vector<Access> accesses;
};

constexpr size_t stack_bytes = 128 * 1024;
constexpr unsigned most_threads = 1024;

struct Range {
    uintptr_t begin, end;
};

struct Usage {
    unsigned threads = 0;
    size_t shared_bytes = 0;  // the most that a launch asked for
};

struct Machine {
    Fiber fibers[most_threads];
    Fiber* current = nullptr;
    jmp_buf scheduler;
    unsigned threads = 0;
    Triple grid, block, block_id;
    size_t shared_bytes = 0;
    uint32_t block_number = 0;  // a stamp, so that nothing of a former block counts
    uint32_t epoch = 0;         // barriers of the block so far
    std::string op, error;
    std::mt19937 random;
    std::vector<Range> allowed;  // device memory
    bool trace = false;          // collect accesses
    uint64_t sample = 0;         // blocks of a launch that are run, if not all
    int multiprocessors = 108;   // what kernels are told of the chip
    size_t shared_bytes_of_chip = 163 * 1024;
    uint64_t launches = 0;
    std::map<const void*, Usage> usage;  // of each kernel launched
};
extern Machine machine;

// Ends the block with a message; does not return. In a kernel: of the current thread.
[[noreturn]] void fail(const std::string& what, const void* pc);
[[noreturn]] void fail(const std::string& what, Site site);
std::string text(Site site);
std::string source_of(const void* pc);  // "file.cu:12", as far as debug information tells
std::string function_at(const void* address);
const void* pc_of(Site site);  // stands for an instruction that has no single address
std::string kernel_at(Triple block, unsigned thread);

void choose_chip(const std::string& target);
void reset_memory();  // for a new block
void check_read(const void* address, size_t size, const void* pc);
void check_write(const void* address, size_t size, const void* pc);
void note_access(Fiber& fiber, const void* address, size_t size, const void* pc);
void count_conflicts(unsigned warp);  // and forgets the accesses

struct Conflict {
    std::string where;
    unsigned ways;
    uint64_t times;
};
std::vector<Conflict> conflicts();  // of instructions with more than one way; forgets them
void forget_conflicts();

}  // namespace emulator
