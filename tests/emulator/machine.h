// A SIMT machine that runs CUDA kernels compiled by g++: the part that kernels see, through the headers in
// include/.
//
// Threads are fibers that run one at a time, in random order, from one rendezvous to the next. Kernels are
// compiled with -fsanitize=thread, whose calls before each access of memory lead to memory.cpp instead of the
// sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Triple {
    unsigned x = 1, y = 1, z = 1;
};

Triple thread_index();
Triple block_index();
Triple block_size();
Triple grid_size();
unsigned lane_index();

constexpr size_t most_shared_bytes = 227 * 1024;  // of a block, on any chip that can be chosen
unsigned char* shared_memory();

// A place in a kernel's source.
struct Site {
    const char* file;
    int line;
};

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// All 32 lanes come with arguments of their own; the last one runs `body` over the arguments of all.
using Body = void (*)(void* const* lanes);
void warp_collective(const char* name, unsigned mask, Site site, void* arguments, Body body);

// Bodies of warp collectives.
struct Shuffle {
    uint64_t bits;    // in: this lane's value, out: that of the source lane
    unsigned source;  // lane
};
void shuffle(void* const* lanes);
struct Vote {
    bool mine;
    unsigned ballot;  // out
};
void vote(void* const* lanes);
struct LoadMatrix {
    const void* row;
    uint32_t r[4];  // out
};
void load_matrix(void* const* lanes);
void load_matrix_transposed(void* const* lanes);
struct Multiply {
    float d[4];
    uint32_t a[4], b[2];
};
void multiply_bf16(void* const* lanes);
void multiply_fp16(void* const* lanes);

// Accesses that the kernel's own loads and stores do not show.
void read_bytes(void* to, const void* from, size_t size, const void* pc);
void write_bytes(void* to, const void* from, size_t size, const void* pc);
void before_atomic(const void* address, size_t size, const void* pc);

// What the kernel before wrote is there from now on, for this thread.
void wait_for_previous();

// Asynchronous copies; a null source means zeros.
void copy_async(void* shared, const void* global, size_t size, const void* pc);
void commit_copies();
void wait_copies(unsigned pending);

// For `mutants.py`: whether this barrier, wait or mask is the one that VAR_EXT_MUTANT takes away.
bool removed(int number);

// Launch. Returns false where hardware would refuse the configuration.
struct Launch {
    Triple grid, block;
    size_t shared_bytes;
    const void* kernel;
};
bool launch(const Launch& launch, void (*call)(void*), void* closure);
void grant_shared_memory(const void* kernel, size_t bytes);
// What kernels are told of the chip.
int multiprocessors();
size_t shared_bytes_of_chip();

}  // namespace emulator
