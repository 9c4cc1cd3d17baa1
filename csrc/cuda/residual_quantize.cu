// Four launches per scale: pack the residual of each pixel, search tiles of the codebook, take the lowest,
// and phi, which updates f_hat and residual and, if a block has whole planes, pools for the next scale.
//
// Counted for one launch instead, a block per image: r and f_hat are 64 KB, but the codebook would stream
// through each SM, and of 680 x 4096 scores of 32 products an image an SM would have 0.7 M cycles, 390 us,
// where all SMs together need 3. So the search is spread over the chip, and separate launches run the
// convolution. Large scales are searched after the filter, as in nearest_code: with 50 images the last four,
// 29 of 34 thousand vectors.
#include "ops/residual_quantize.h"

#include <algorithm>
#include <string>

#include "cuda/nearest_code.cuh"
#include "cuda/residual_quantize_codes.cuh"
#include "cuda/residual_step_backward.cuh"

namespace var_ext::cuda {

namespace {

PhiTiles sizes(const char* op, const QuantizerShape& q) {
    constexpr int64_t limit = int64_t{1} << 31;
    if (q.side > resample_max_side || q.channels > 4096 || q.batch * q.tokens >= limit) {
        contract_error(op, "sides, C and B * L must be at most " + std::to_string(resample_max_side) +
                               ", 4096 and 2^31 - 1 on CUDA, got " + std::to_string(q.side) + ", " +
                               std::to_string(q.channels) + " and " + std::to_string(q.batch * q.tokens));
    }
    PhiTiles tiles{};
    tiles.channels = static_cast<int>(q.channels);
    tiles.height = tiles.width = static_cast<int>(q.side);
    return tiles;
}

// (B, C, side, side), contiguous.
PhiGrid square(const float* data, int64_t channels, int64_t side) {
    return {data, {channels * side * side, side * side, side, 1}};
}
PhiStore square_store(float* data, int64_t channels, int64_t side) {
    return {data, {channels * side * side, side * side, side, 1}};
}

unsigned blocks_of(int64_t count) {
    return static_cast<unsigned>((count + quantize_threads - 1) / quantize_threads);
}

}  // namespace

void residual_quantize(const ResidualQuantizeParams& p, const CudaStream& stream) {
    const char* op = "residual_quantize";
    const QuantizerShape& q = p.shape;
    if (q.batch == 0) return;
    PhiParams phi{};
    phi.tiles = sizes(op, q);
    const ResidualQuantizeLayout layout(q.batch, q.channels, q.codes, q.patch_nums);
    if (p.scratch == nullptr) {
        contract_error(op,
                       "scratch must have shape (" + std::to_string(layout.size) + ",) on CUDA, got none");
    }
    float *residual = p.scratch + layout.residual, *pooled = p.scratch + layout.pooled;
    const PhiGrid features = {
        p.features,
        {p.features_strides[0], p.features_strides[1], p.features_strides[2], p.features_strides[3]}};
    phi.ratio = q.ratio;
    phi.chain = phi.tiles.channels;

    bool has_windows = false;  // of this scale
    int64_t done = 0;          // tokens of an image
    for (size_t k = 0; k < q.patch_nums.size(); ++k) {
        const int64_t side = q.patch_nums[k], count = side * side;
        const PhiGrid rest = k == 0 ? features : square(residual, q.channels, q.side);
        PixelRows rows = {rest, static_cast<int>(side)};
        if (side != q.side) {
            rows.grid = square(pooled, q.channels, side);
            phi.next_height = phi.next_width = static_cast<int>(side);
            if (!has_windows) {
                launch_pool(op, stream, q.batch, phi, rest, square_store(pooled, q.channels, side));
            }
        }
        CodeSearch search = code_search(p.scratch, layout.search(q.batch, side, q.channels, q.codes),
                                        q.batch * count, q.codes, q.channels, p.tokens + done);
        search.image = count;
        search.image_stride = q.tokens;
        if (k == 0) pack_codes(op, stream, search, p.codebook, p.codebook_strides, p.cosine);
        const PackedRows packed = {const_cast<float*>(search.rows), nullptr, search.n, search.channels,
                                   search.channels_packed,          false,   p.cosine};
        pack_rows(op, stream, rows, packed, NoFilter{}, search.n);
        search_codes(op, stream, search);

        const TokenCodes codes = {
            p.codebook, p.codebook_strides[0], p.codebook_strides[1], q.codes - 1, p.tokens + done,
            q.tokens,   static_cast<int>(side)};
        const bool last = k + 1 == q.patch_nums.size();
        const QuantizeStep step = {
            features,
            p.f_hat,
            residual,
            p.scales ? p.scales + static_cast<int64_t>(k) * q.batch * q.channels * q.side * q.side : nullptr,
            phi.tiles.channels,
            phi.tiles.width,
            k == 0,
            last};
        phi.tiles.codes_height = phi.tiles.codes_width = static_cast<int>(side);
        phi.weight = p.weight + q.phi_index[k] * q.channels * q.channels * 9;
        phi.bias = p.bias + q.phi_index[k] * q.channels;
        phi.pools = !last && q.patch_nums[k + 1] != q.side;
        if (phi.pools) {
            const int64_t next = q.patch_nums[k + 1];
            const PhiStore windows = square_store(pooled, q.channels, next);
            phi.next = windows.data;
            phi.next_height = phi.next_width = static_cast<int>(next);
            std::copy(windows.strides, windows.strides + 4, phi.next_strides);
        }
        has_windows = launch_phi(op, stream, q.batch, phi, codes, step);
        done += count;
    }
}

void residual_quantize_backward(const ResidualQuantizeBackwardParams& p, const CudaStream& stream) {
    const char* op = "residual_quantize_backward";
    const QuantizerShape& q = p.shape;
    const PhiTiles tiles = sizes(op, q);
    const ResidualQuantizeBackwardLayout layout(q.batch, q.channels, q.patch_nums);
    if (p.scratch == nullptr) {
        contract_error(op,
                       "scratch must have shape (" + std::to_string(layout.size) + ",) on CUDA, got none");
    }
    const size_t codebook_bytes = quantize_codes * static_cast<size_t>(q.channels) * sizeof(float);
    check_shared(op, stream, codebook_bytes);  // before anything is launched
    float *grad = p.scratch, *grad_codes = p.scratch + layout.codes;
    const int64_t matrix = 9 * q.channels * q.channels, all = q.batch * q.channels * q.side * q.side;
    for (int64_t n = 0; n < p.convolutions; ++n) {
        const bool used = q.batch > 0 && std::count(q.phi_index.begin(), q.phi_index.end(), n) > 0;
        if (used) continue;
        launch(op, stream, dim3(blocks_of(matrix)), quantize_threads, 0, residual_quantize_clear_kernel<true>,
               p.grad_weight + n * matrix, matrix);
        launch(op, stream, dim3(blocks_of(q.channels)), quantize_threads, 0,
               residual_quantize_clear_kernel<true>, p.grad_bias + n * q.channels, q.channels);
    }

    int64_t left = q.tokens;
    const int64_t scales = static_cast<int64_t>(q.patch_nums.size());
    for (int64_t k = scales - 1; k >= 0 && q.batch > 0; --k) {
        const int64_t side = q.patch_nums[k], n = q.phi_index[k];
        left -= side * side;
        // What scale k adds is in f_hat after it and after all finer ones.
        launch(op, stream, dim3(blocks_of(all)), quantize_threads, 0,
               k == scales - 1 ? residual_quantize_sum_kernel<false> : residual_quantize_sum_kernel<true>,
               grad, p.grad_scales + k * all, all);

        PhiBackward<TokenCodes> step{};
        step.tiles = tiles;
        step.tiles.codes_height = step.tiles.codes_width = static_cast<int>(side);
        step.batch = q.batch;
        step.grad = square(grad, q.channels, q.side);
        step.codes = {p.codebook, p.codebook_strides[0], p.codebook_strides[1], q.codes - 1, p.tokens + left,
                      q.tokens,   static_cast<int>(side)};
        step.weight = p.weight + n * matrix;
        step.ratio = q.ratio;
        step.wants_codes = true;
        step.adds = std::count(q.phi_index.begin() + k + 1, q.phi_index.end(), n) > 0;
        step.grad_weight = p.grad_weight + n * matrix;
        step.grad_bias = p.grad_bias + n * q.channels;
        step.scratch = p.scratch + layout.step;
        const TokenStore store = {grad_codes + left * q.channels, q.tokens, tiles.channels,
                                  static_cast<int>(side)};
        phi_backward(op, stream, step, store);
    }
    launch(op, stream, dim3(static_cast<unsigned>((q.codes + quantize_codes - 1) / quantize_codes)),
           quantize_codebook_threads, codebook_bytes, residual_quantize_codebook_kernel<true>, p.tokens,
           static_cast<const float*>(grad_codes), q.batch * q.tokens, q.codes, tiles.channels,
           p.grad_codebook);
}

}  // namespace var_ext::cuda
