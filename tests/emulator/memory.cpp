// Every access of memory by a kernel: bounds, alignment, what was written, who else is at it.
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "state.h"

namespace emulator {

namespace {

alignas(1024) unsigned char block_memory[most_shared_bytes];

constexpr uint16_t nobody = 0xffff, many_lanes = 0xfffe, many_warps = 0xfffd, by_atomic = 0xfffc;

// Two bytes of shared memory, the size of the smallest element.
struct Granule {
    uint32_t block = 0;       // the stamp of the block that wrote it; of another: not written
    uint32_t read_block = 0;  // likewise for the reader
    uint32_t write_epoch, write_warp_epoch;
    uint32_t read_epoch, read_warp_epoch;
    uint16_t writer = nobody, reader = nobody, reader_warp = 0;
    uint16_t pending = 0;  // asynchronous copies under way
    uint32_t pending_block = 0;
};
Granule granules[most_shared_bytes / 2];

uintptr_t address_of(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer);
}

bool in_shared(uintptr_t address) {
    const uintptr_t begin = address_of(block_memory);
    return address >= begin && address < begin + sizeof(block_memory);
}

std::string hex(uintptr_t address) {
    char digits[32];
    snprintf(digits, sizeof(digits), "0x%zx", static_cast<size_t>(address));
    return digits;
}

std::string bytes_at(const char* verb, size_t size, uintptr_t address) {
    const bool shared = in_shared(address);
    return std::string(verb) + " " + std::to_string(size) + " bytes of " + (shared ? "shared" : "device") +
           " memory at " + (shared ? std::to_string(address - address_of(block_memory)) : hex(address));
}

bool in_own_stack(uintptr_t address) {
    const uintptr_t stack = address_of(machine.current->stack);
    return address >= stack && address < stack + stack_bytes;
}

// Read-only data and code of this module: tables that a compiler made.
bool in_own_image(uintptr_t address) {
    static const Range image = [] {
        Range found = {0, 0};
        const auto visit = [](dl_phdr_info* info, size_t, void* data) {
            auto* range = static_cast<Range*>(data);
            const uintptr_t self = address_of(block_memory);
            bool mine = false;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& part = info->dlpi_phdr[i];
                const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
                if (part.p_type == PT_LOAD && self >= begin && self < begin + part.p_memsz) mine = true;
            }
            for (int i = 0; mine && i < info->dlpi_phnum; ++i) {
                const auto& part = info->dlpi_phdr[i];
                if (part.p_type != PT_LOAD || (part.p_flags & PF_W) != 0) continue;
                const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
                range->begin = range->end == 0 ? begin : std::min(range->begin, begin);
                range->end = std::max(range->end, begin + part.p_memsz);
            }
            return mine ? 1 : 0;
        };
        dl_iterate_phdr(visit, &found);
        return found;
    }();
    return address >= image.begin && address < image.end;
}

bool ordered_after_writer(const Granule& g, const Fiber& fiber) {
    if (g.writer == fiber.thread || g.write_epoch < machine.epoch) return true;
    return g.writer < most_threads && g.writer / 32 == fiber.thread / 32 &&
           g.write_warp_epoch < fiber.warp_epoch;
}

bool ordered_after_readers(const Granule& g, const Fiber& fiber) {
    if (g.read_block != machine.block_number || g.read_epoch < machine.epoch || g.reader == fiber.thread)
        return true;
    if (g.reader == many_warps || g.reader_warp != fiber.thread / 32) return false;
    return g.read_warp_epoch < fiber.warp_epoch;
}

void note_reader(Granule& g, const Fiber& fiber) {
    const uint16_t thread = static_cast<uint16_t>(fiber.thread),
                   warp = static_cast<uint16_t>(fiber.thread / 32);
    const bool first = g.read_block != machine.block_number || g.read_epoch != machine.epoch;
    if (first || (g.reader != many_warps && g.reader_warp == warp && g.read_warp_epoch < fiber.warp_epoch)) {
        g.reader = thread;
        g.reader_warp = warp;
        g.read_warp_epoch = fiber.warp_epoch;
    } else if (g.reader != many_warps && g.reader_warp != warp) {
        g.reader = many_warps;
    } else if (g.reader != many_warps && g.reader != thread) {
        g.reader = many_lanes;
    }
    g.read_block = machine.block_number;
    g.read_epoch = machine.epoch;
}

void note_writer(Granule& g, const Fiber& fiber, uint16_t writer) {
    g.block = machine.block_number;
    g.writer = writer;
    g.write_epoch = machine.epoch;
    g.write_warp_epoch = fiber.warp_epoch;
}

bool is_pending(const Granule& g) {
    return g.pending_block == machine.block_number && g.pending > 0;
}

void check_alignment(const char* verb, uintptr_t address, size_t size, const void* pc) {
    // a power of two: a division would cost more than the access
    if ((address & (size - 1)) != 0) fail(bytes_at(verb, size, address) + ", which is misaligned", pc);
}

Granule* checked_granules(const char* verb, uintptr_t address, size_t size, const void* pc) {
    const size_t offset = address - address_of(block_memory);
    if (offset + size > machine.shared_bytes) {
        fail(bytes_at(verb, size, address) + ", out of bounds: the block has " +
                 std::to_string(machine.shared_bytes),
             pc);
    }
    return granules + offset / 2;
}

void check_device(const char* verb, uintptr_t address, size_t size, const void* pc) {
    if (!machine.current->waited) {
        fail(bytes_at(verb, size, address) + " before the wait for the kernel before it", pc);
    }
    for (Range& range : machine.allowed) {
        if (address >= range.begin && address + size <= range.end) {
            std::swap(range, machine.allowed.front());  // the next one is likely to lie there too
            return;
        }
    }
    fail(bytes_at(verb, size, address) + ", out of bounds", pc);
}

size_t count_of(uintptr_t address, size_t size) {
    return (address % 2 + size + 1) / 2;
}

void check_shared_read(uintptr_t address, size_t size, const void* pc) {
    Granule* g = checked_granules("reads", address, size, pc);
    Fiber& self = *machine.current;
    for (size_t i = 0; i < count_of(address, size); ++i) {
        if (is_pending(g[i])) {
            fail(bytes_at("reads", size, address) + " before the wait for an asynchronous copy into it", pc);
        }
        if (g[i].block != machine.block_number) {
            fail(bytes_at("reads", size, address) + " that nobody has written", pc);
        }
        if (!ordered_after_writer(g[i], self)) {
            fail(bytes_at("reads", size, address) + " without a barrier after the write of " +
                     (g[i].writer < most_threads ? "thread " + std::to_string(g[i].writer) : "an atomic"),
                 pc);
        }
        note_reader(g[i], self);
    }
}

void check_shared_write(uintptr_t address, size_t size, const void* pc, uint16_t writer) {
    Granule* g = checked_granules("writes", address, size, pc);
    Fiber& self = *machine.current;
    for (size_t i = 0; i < count_of(address, size); ++i) {
        if (is_pending(g[i])) {
            fail(bytes_at("writes", size, address) + " before the wait for an asynchronous copy into it", pc);
        }
        const bool both_atomic = writer == by_atomic && g[i].writer == by_atomic;
        if (g[i].block == machine.block_number && !both_atomic && !ordered_after_writer(g[i], self)) {
            fail(bytes_at("writes", size, address) + " without a barrier after the write of thread " +
                     std::to_string(g[i].writer),
                 pc);
        }
        if (!ordered_after_readers(g[i], self)) {
            fail(bytes_at("writes", size, address) + " without a barrier after a read of " +
                     (g[i].reader < most_threads ? "thread " + std::to_string(g[i].reader) : "other threads"),
                 pc);
        }
        note_writer(g[i], self, writer);
    }
}

}  // namespace

unsigned char* shared_memory() {
    return block_memory;
}

void reset_memory() {
    ++machine.block_number;
    machine.epoch = 0;
    memset(block_memory, 0xff, machine.shared_bytes);  // NaN in every format
}

void check_read(const void* pointer, size_t size, const void* pc) {
    const uintptr_t address = address_of(pointer);
    if (in_own_stack(address)) return;
    check_alignment("reads", address, size, pc);
    if (in_shared(address)) {
        check_shared_read(address, size, pc);
        note_access(*machine.current, pointer, size, pc);
    } else if (!in_own_image(address)) {
        check_device("reads", address, size, pc);
    }
}

void check_write(const void* pointer, size_t size, const void* pc) {
    const uintptr_t address = address_of(pointer);
    if (in_own_stack(address)) return;
    check_alignment("writes", address, size, pc);
    if (in_shared(address)) {
        check_shared_write(address, size, pc, static_cast<uint16_t>(machine.current->thread));
        note_access(*machine.current, pointer, size, pc);
    } else {
        check_device("writes", address, size, pc);
    }
}

void read_bytes(void* to, const void* from, size_t size, const void* pc) {
    check_read(from, size, pc);
    memcpy(to, from, size);
}

void write_bytes(void* to, const void* from, size_t size, const void* pc) {
    check_write(to, size, pc);
    memcpy(to, from, size);
}

void before_atomic(const void* pointer, size_t size, const void* pc) {
    const uintptr_t address = address_of(pointer);
    check_alignment("adds to", address, size, pc);
    if (!in_shared(address)) return check_device("adds to", address, size, pc);
    const Granule& g = *checked_granules("adds to", address, size, pc);
    if (g.block != machine.block_number)
        fail(bytes_at("adds to", size, address) + " that nobody has written", pc);
    check_shared_write(address, size, pc, by_atomic);
}

void copy_async(void* shared, const void* global, size_t size, const void* pc) {
    const uintptr_t to = address_of(shared);
    if (!in_shared(to)) fail(bytes_at("copies to", size, to) + ", which is not shared", pc);
    check_alignment("copies to", to, size, pc);
    if (global != nullptr) {
        check_alignment("copies from", address_of(global), size, pc);
        check_device("copies from", address_of(global), size, pc);
    }
    // it may land at any time from now on, so it has to come after all former accesses
    check_shared_write(to, size, pc, static_cast<uint16_t>(machine.current->thread));
    note_access(*machine.current, shared, size, pc);
    Granule* g = checked_granules("copies to", to, size, pc);
    for (size_t i = 0; i < size / 2; ++i) {
        g[i].pending = is_pending(g[i]) ? g[i].pending + 1 : 1;
        g[i].pending_block = machine.block_number;
    }
    memset(shared, 0xff, size);
    machine.current->open.push_back({static_cast<unsigned char*>(shared), global, size, pc});
}

void commit_copies() {
    Fiber& self = *machine.current;
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}

void wait_copies(unsigned pending) {
    Fiber& self = *machine.current;
    while (self.groups.size() > pending) {
        for (const Copy& copy : self.groups.front()) {
            Granule* g = granules + (copy.to - block_memory) / 2;
            for (size_t i = 0; i < copy.size / 2; ++i) {
                --g[i].pending;
                note_writer(g[i], self, static_cast<uint16_t>(self.thread));
            }
            if (copy.from != nullptr) {
                memcpy(copy.to, copy.from, copy.size);
            } else {
                memset(copy.to, 0, copy.size);
            }
        }
        self.groups.pop_front();
    }
}

static std::set<std::string> sites;

// What the tool of that name says of an address, line by line.
static std::vector<std::string> addr2line(const char* options, const void* address, unsigned back) {
    Dl_info info;
    if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return {};
    const uintptr_t offset = address_of(address) - address_of(info.dli_fbase) - back;
    const std::string command =
        std::string("addr2line ") + options + " -e '" + info.dli_fname + "' " + hex(offset) + " 2>&1";
    std::vector<std::string> lines;
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char line[4096];
        while (fgets(line, sizeof(line), pipe) != nullptr) {
            lines.emplace_back(line);
            lines.back().erase(std::min(lines.back().find('\n'), lines.back().size()));
        }
        pclose(pipe);
    }
    return lines;
}

const void* pc_of(Site site) {
    return &*sites.insert(text(site)).first;
}

std::string source_of(const void* pc) {
    for (const std::string& site : sites) {
        if (&site == pc) return site;
    }
    std::string found;
    for (std::string place : addr2line("-s -i", pc, 1)) {  // inside the call
        place.erase(std::min(place.find(' '), place.size()));
        found += (found.empty() ? "" : " < ") + place;
    }
    return found.empty() ? hex(address_of(pc)) : found;
}

std::string function_at(const void* address) {
    const std::vector<std::string> lines = addr2line("-f -C", address, 0);
    return lines.empty() ? hex(address_of(address)) : lines.front();
}

}  // namespace emulator

// What g++ -fsanitize=thread calls before each access. Host code of the same files has no current thread.
#define HOOK(name, check, size)                                                                     \
    extern "C" void __tsan_##name(void* address) {                                                  \
        if (emulator::machine.current) emulator::check(address, size, __builtin_return_address(0)); \
    }
#define HOOKS(size)                                \
    HOOK(read##size, check_read, size)             \
    HOOK(write##size, check_write, size)           \
    HOOK(unaligned_read##size, check_read, size)   \
    HOOK(unaligned_write##size, check_write, size) \
    HOOK(volatile_read##size, check_read, size)    \
    HOOK(volatile_write##size, check_write, size)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_read_range(void* address, size_t size) {
    if (!emulator::machine.current) return;
    auto* bytes = static_cast<unsigned char*>(address);
    for (size_t i = 0; i < size; ++i) emulator::check_read(bytes + i, 1, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t size) {
    if (!emulator::machine.current) return;
    auto* bytes = static_cast<unsigned char*>(address);
    for (size_t i = 0; i < size; ++i) emulator::check_write(bytes + i, 1, __builtin_return_address(0));
}
