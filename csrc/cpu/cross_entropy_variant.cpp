// The body of cross_entropy, compiled once for each variant. A row is read from memory once and then from the
// cache.
#include "cpu/cross_entropy.h"

#include "cpu/rows.h"

namespace {

constexpr float log2_of_e = 1.44269504f;

var_ext::cpu::LogitRow read(const float* logits, int64_t classes) {
    V most = V{} - __builtin_inff();
    int64_t i = 0;
    for (; i + lanes <= classes; i += lanes) most = larger(most, load<V>(logits + i));
    float largest = most[0];
    for (int lane = 1; lane < lanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    for (; i < classes; ++i) largest = logits[i] > largest ? logits[i] : largest;
    V sum{}, total{};
    for_vectors(classes, [&](int64_t at, auto part) {
        const V x = only(load_as<V>(logits + at, part) - largest, part);
        sum += only(exp2_flushed(x * log2_of_e), part);
        total += x;
    });
    return {largest, reduce_add(sum), reduce_add(total)};
}

void backward(const float* logits, int64_t classes, const float* stats, float grad, float share, float* out) {
    const float largest = stats[0], log = stats[1];
    for_vectors(classes, [&](int64_t i, auto part) {
        const V p = exp2_flushed((load_as<V>(logits + i, part) - largest - log) * log2_of_e);
        store_as(out + i, (p - share) * grad, part);
    });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(CrossEntropyKernel, cross_entropy) = {read, backward};

}  // namespace var_ext::cpu
