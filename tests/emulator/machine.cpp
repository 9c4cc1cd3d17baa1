// Blocks, fibers, barriers and warp collectives.
#include <sys/mman.h>
#include <ucontext.h>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <map>
#include <numeric>

#include "state.h"

namespace emulator {

Machine machine;

namespace {

constexpr unsigned lanes_of_warp = 32;
void (*call_kernel)(void*);
void* closure;
const void* kernel_address;
std::map<const void*, size_t> granted;

[[noreturn]] void leave_block(const std::string& message) {
    if (machine.error.empty()) machine.error = message;
    _longjmp(machine.scheduler, 1);
}

void switch_to_scheduler() {
    if (_setjmp(machine.current->context) == 0) _longjmp(machine.scheduler, 1);
}

// The life of a fiber: one kernel after another.
void live() {
    for (;;) {
        call_kernel(closure);
        Fiber& self = *machine.current;
        self.groups.push_back(std::move(self.open));
        for (const auto& group : self.groups) {
            for (const Copy& copy : group) fail("ends before its asynchronous copy was waited for", copy.pc);
        }
        self.groups.clear();
        self.open.clear();
        if (!self.waited) fail("ends without a wait for the kernel before it", kernel_address);
        self.wait = Wait::done;
        switch_to_scheduler();
    }
}

// Continues a fiber until it waits. volatile: the value must survive the jump.
void run(Fiber& fiber) {
    machine.current = &fiber;
    fiber.wait = Wait::none;
    if (_setjmp(machine.scheduler) == 0) {
        if (fiber.alive) _longjmp(fiber.context, 1);
        if (fiber.stack == nullptr) {
            void* memory =
                mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
            fiber.stack = static_cast<unsigned char*>(memory);
        }
        static ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack;
        context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, live, 0);
        fiber.alive = true;
        setcontext(&context);
    }
    machine.current = nullptr;
}

std::string standing(const Fiber& fiber) {
    const std::string who = "thread " + std::to_string(fiber.thread);
    if (fiber.wait == Wait::done) return who + " has ended";
    return who + " waits at " + fiber.name + " (" + text(fiber.site) + ")";
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.wait == b.wait && a.site.line == b.site.line && a.name == b.name &&
           (a.site.file == b.site.file || std::strcmp(a.site.file, b.site.file) == 0);
}

// Nothing can go on: says who waits for whom.
[[noreturn]] void report_deadlock() {
    Fiber* first = machine.fibers;
    Fiber* end = first + machine.threads;
    // the thread that waits for others of its warp, if there is one: that is the narrower trouble
    Fiber* waiting = std::find_if(first, end, [](const Fiber& f) { return f.wait == Wait::warp; });
    if (waiting != end) {
        first += waiting->thread / lanes_of_warp * lanes_of_warp;
        end = first + lanes_of_warp;
    } else {
        waiting = std::find_if(first, end, [](const Fiber& f) { return f.wait == Wait::block; });
    }
    Fiber* other = std::find_if(first, end, [&](const Fiber& f) { return !same_place(f, *waiting); });
    const char* whole = waiting->wait == Wait::warp ? "warp" : "block";
    throw Error(machine.op + ": block " + kernel_at(machine.block_id, waiting->thread) + ": part of the " +
                whole + " misses a barrier: " + standing(*waiting) + ", " + standing(*other));
}

// Whether the threads [first, first + count) stand at one place of this kind.
bool together(unsigned first, unsigned count, Wait wait) {
    for (unsigned i = first; i < first + count; ++i) {
        const Fiber& fiber = machine.fibers[i];
        if (fiber.wait != wait || !same_place(fiber, machine.fibers[first])) return false;
    }
    return true;
}

void finish_collective(unsigned warp) {
    Fiber* lanes = machine.fibers + warp * lanes_of_warp;
    void* arguments[lanes_of_warp];
    for (unsigned i = 0; i < lanes_of_warp; ++i) arguments[i] = lanes[i].arguments;
    machine.current = lanes;  // who is named if the body finds something; it sets the lane itself
    if (lanes->body != nullptr) {
        if (_setjmp(machine.scheduler) == 0) lanes->body(arguments);
    } else {
        for (unsigned i = 0; i < lanes_of_warp; ++i) ++lanes[i].warp_epoch;
    }
    machine.current = nullptr;
    count_conflicts(warp);
    for (unsigned i = 0; i < lanes_of_warp; ++i) lanes[i].wait = Wait::none;
}

// Runs one warp until all its threads wait for others.
void run_warp(unsigned warp) {
    unsigned order[lanes_of_warp];
    std::iota(order, order + lanes_of_warp, warp * lanes_of_warp);
    do {
        std::shuffle(order, order + lanes_of_warp, machine.random);
        for (unsigned thread : order) {
            if (machine.fibers[thread].wait == Wait::none) run(machine.fibers[thread]);
            if (!machine.error.empty()) return;
        }
        if (!together(warp * lanes_of_warp, lanes_of_warp, Wait::warp)) return;
        finish_collective(warp);
    } while (machine.error.empty());
}

void run_block() {
    const unsigned warps = machine.threads / lanes_of_warp;
    for (unsigned i = 0; i < machine.threads; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.thread = i;
        fiber.wait = Wait::none;
        fiber.warp_epoch = 0;
        fiber.waited = false;
        fiber.open.clear();
        fiber.groups.clear();
        fiber.accesses.clear();
    }
    reset_memory();
    std::vector<unsigned> order(warps);
    std::iota(order.begin(), order.end(), 0u);
    for (;;) {
        std::shuffle(order.begin(), order.end(), machine.random);
        for (unsigned warp : order) {
            run_warp(warp);
            if (!machine.error.empty()) throw Error(machine.error);
        }
        if (together(0, machine.threads, Wait::block)) {
            ++machine.epoch;
            for (unsigned i = 0; i < machine.threads; ++i) {
                machine.fibers[i].wait = Wait::none;
                ++machine.fibers[i].warp_epoch;
            }
            for (unsigned warp = 0; warp < warps; ++warp) count_conflicts(warp);
            continue;
        }
        const bool ended = std::all_of(machine.fibers, machine.fibers + machine.threads,
                                       [](const Fiber& fiber) { return fiber.wait == Wait::done; });
        if (!ended) report_deadlock();
        for (unsigned warp = 0; warp < warps; ++warp) count_conflicts(warp);
        return;
    }
}

}  // namespace

Triple thread_index() {
    return {machine.current->thread % machine.block.x,
            machine.current->thread / machine.block.x % machine.block.y,
            machine.current->thread / machine.block.x / machine.block.y};
}
Triple block_index() {
    return machine.block_id;
}
Triple block_size() {
    return machine.block;
}
Triple grid_size() {
    return machine.grid;
}
unsigned lane_index() {
    return machine.current->thread % lanes_of_warp;
}

std::string text(Site site) {
    const std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string kernel_at(Triple block, unsigned thread) {
    return "(" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) +
           ") thread " + std::to_string(thread);
}

void fail(const std::string& what, const void* pc) {
    leave_block(machine.op + ": block " + kernel_at(machine.block_id, machine.current->thread) + ": " + what +
                " (" + source_of(pc) + ")");
}
void fail(const std::string& what, Site site) {
    leave_block(machine.op + ": block " + kernel_at(machine.block_id, machine.current->thread) + ": " + what +
                " (" + text(site) + ")");
}

void wait_for_previous() {
    machine.current->waited = true;
}

void block_barrier(Site site) {
    Fiber& self = *machine.current;
    self.wait = Wait::block;
    self.name = "__syncthreads";
    self.site = site;
    switch_to_scheduler();
}

void warp_collective(const char* name, unsigned mask, Site site, void* arguments, Body body) {
    if (mask != 0xffffffff)
        fail(std::string(name) + " with a mask of part of the warp is not emulated", site);
    Fiber& self = *machine.current;
    self.wait = Wait::warp;
    self.name = name;
    self.site = site;
    self.arguments = arguments;
    self.body = body;
    switch_to_scheduler();
}

void warp_barrier(unsigned mask, Site site) {
    warp_collective("__syncwarp", mask, site, nullptr, nullptr);
}

int multiprocessors() {
    return machine.multiprocessors;
}

bool removed(int number) {
    static const char* const said = std::getenv("VAR_EXT_MUTANT");
    static const int chosen = said == nullptr ? -1 : std::atoi(said);
    return number == chosen;
}
size_t shared_bytes_of_chip() {
    return machine.shared_bytes_of_chip;
}

void choose_chip(const std::string& target) {
    // the most that a block may have: CUDA C++ Programming Guide, technical specifications per compute
    // capability
    static const std::map<std::string, size_t> kilobytes = {
        {"80", 163}, {"86", 99}, {"89", 99}, {"90", 227}, {"120", 99}};
    const auto found = kilobytes.find(target);
    if (found == kilobytes.end()) throw Error("chip must be 80, 86, 89, 90 or 120, got " + target);
    machine.shared_bytes_of_chip = found->second * 1024;
}

void grant_shared_memory(const void* kernel, size_t bytes) {
    granted[kernel] = std::max(granted[kernel], bytes);
}

bool launch(const Launch& launch, void (*call)(void*), void* arguments) {
    const auto [grid, block, shared_bytes, kernel] = launch;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z,
                   blocks = uint64_t{grid.x} * grid.y * grid.z;
    const auto found = granted.find(kernel);
    const size_t most = found == granted.end() ? 48 * 1024 : std::max<size_t>(found->second, 48 * 1024);
    if (threads == 0 || threads > most_threads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || block.z > 64 || shared_bytes > std::min(most, machine.shared_bytes_of_chip)) {
        return false;
    }
    if (threads % lanes_of_warp != 0) throw Error(machine.op + ": a block of part of a warp is not emulated");

    machine.threads = static_cast<unsigned>(threads);
    kernel_address = kernel;
    machine.grid = grid;
    machine.block = block;
    machine.shared_bytes = shared_bytes;
    machine.error.clear();
    ++machine.launches;
    Usage& usage = machine.usage[kernel];
    usage.threads = std::max(usage.threads, machine.threads);
    usage.shared_bytes = std::max(usage.shared_bytes, shared_bytes);
    call_kernel = call;
    closure = arguments;
    // blocks in an order of no use to anyone: a stride without a common divisor, from a random start
    uint64_t stride = blocks / 2 + machine.random() % 64 + 1;
    while (std::gcd(stride, blocks) != 1) ++stride;
    uint64_t id = machine.random() % blocks;
    const bool sampled = machine.sample != 0 && machine.sample < blocks;
    try {
        for (uint64_t i = 0; i < (sampled ? machine.sample : blocks); ++i, id = (id + stride) % blocks) {
            if (sampled && i < 2) id = i == 0 ? 0 : blocks - 1;  // the first, the last, and others
            machine.block_id = {static_cast<unsigned>(id % grid.x),
                                static_cast<unsigned>(id / grid.x % grid.y),
                                static_cast<unsigned>(id / grid.x / grid.y)};
            run_block();
        }
    } catch (const Error&) {
        for (Fiber& fiber : machine.fibers) fiber.alive = false;  // they stand in the middle of a kernel
        throw;
    }
    return true;
}

}  // namespace emulator
