// Bank conflicts of shared memory: 32 banks of 4 bytes; words of one bank cost a pass each. Accesses of 8
// bytes are served half a warp at a time, those of 16 a quarter.
#include <algorithm>
#include <map>

#include "state.h"

namespace emulator {

namespace {

struct Count {
    unsigned ways = 1;
    uint64_t times = 0;
    std::string first;  // op, block and thread
};
std::map<const void*, Count> counts;

unsigned ways_of(const uint32_t* offsets, const bool* there, uint32_t size) {
    std::vector<uint32_t> words[32];
    unsigned most = 1;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!there[lane]) continue;
        for (uint32_t word = offsets[lane] / 4; word <= (offsets[lane] + size - 1) / 4; ++word) {
            auto& bank = words[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
            most = std::max<unsigned>(most, bank.size());
        }
    }
    return most;
}

}  // namespace

void note_access(Fiber& fiber, const void* address, size_t size, const void* pc) {
    if (!machine.trace) return;
    const size_t offset = static_cast<const unsigned char*>(address) - shared_memory();
    fiber.accesses.push_back({pc, static_cast<uint32_t>(offset), static_cast<uint32_t>(size)});
}

void count_conflicts(unsigned warp) {
    if (!machine.trace) return;
    // the n-th access from one instruction in each lane is one access of the warp
    struct Group {
        uint32_t offsets[32];
        bool there[32] = {};
        uint32_t size;
    };
    std::map<std::pair<const void*, unsigned>, Group> groups;
    for (unsigned lane = 0; lane < 32; ++lane) {
        Fiber& fiber = machine.fibers[warp * 32 + lane];
        std::map<const void*, unsigned> seen;
        for (const Access& access : fiber.accesses) {
            Group& group = groups[{access.pc, seen[access.pc]++}];
            group.offsets[lane] = access.offset;
            group.there[lane] = true;
            group.size = access.size;
        }
        fiber.accesses.clear();
    }
    for (const auto& [key, group] : groups) {
        const unsigned phases = std::max(1u, group.size / 4), width = 32 / phases;
        for (unsigned phase = 0; phase < phases; ++phase) {
            bool there[32] = {};
            std::copy(group.there + phase * width, group.there + (phase + 1) * width, there + phase * width);
            const unsigned ways = ways_of(group.offsets, there, group.size);
            Count& count = counts[key.first];
            count.ways = std::max(count.ways, ways);
            count.times += ways > 1;
            if (ways > 1 && count.first.empty()) {
                const unsigned lane = static_cast<unsigned>(std::find(there, there + 32, true) - there);
                count.first = machine.op + ": block " + kernel_at(machine.block_id, warp * 32 + lane);
            }
        }
    }
}

std::vector<Conflict> conflicts() {
    std::vector<Conflict> found;
    for (const auto& [pc, count] : counts) {
        if (count.ways == 1) continue;
        found.push_back({count.first + " (" + source_of(pc) + ")", count.ways, count.times});
    }
    counts.clear();
    return found;
}

void forget_conflicts() {
    counts.clear();
}

}  // namespace emulator
