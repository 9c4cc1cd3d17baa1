#include "cpu/bias_residual.h"

#include <algorithm>

#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

void bias_residual(const BiasResidualParams& p) {
    if (p.batch * p.channels * p.pixels == 0) return;
    const auto& kernel = VAR_EXT_SELECT(bias_residual);
    if (p.out != p.h) prefer_huge_pages(p.out, p.batch * p.channels * p.pixels * dtype_size(p.dtype));
    const int64_t rows = p.batch * (p.channels_last ? p.pixels : p.channels);
    const int64_t size = p.channels_last ? p.channels : p.pixels;
    const int64_t chunk = (16 * 1024 + size - 1) / size, chunks = (rows + chunk - 1) / chunk;
    parallel_for(thread_count(chunks, chunk * size), chunks, [&](int64_t i, int) {
        const auto run = p.channels_last ? kernel.pixels : kernel.maps;
        run(p, i * chunk, std::min(rows, (i + 1) * chunk));
    });
}

}  // namespace var_ext::cpu
