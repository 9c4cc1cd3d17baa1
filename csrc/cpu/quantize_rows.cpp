#include "cpu/quantize_rows.h"

#include <algorithm>

#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

void quantize_rows(const QuantizeRowsParams& p) {
    const auto& kernel = VAR_EXT_SELECT(quantize_rows);
    prefer_huge_pages(p.q, p.rows * p.channels);
    const int64_t rows = (16 * 1024 + p.channels - 1) / p.channels, chunks = (p.rows + rows - 1) / rows;
    parallel_for(thread_count(chunks, rows * p.channels), chunks, [&](int64_t chunk, int) {
        kernel.run(p, chunk * rows, std::min(p.rows, (chunk + 1) * rows));
    });
}

}  // namespace var_ext::cpu
