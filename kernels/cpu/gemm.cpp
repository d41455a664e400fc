// The product of INT4 layers on CPUs with AVX2 or AVX-512 VNNI: integers, the zero point, scales and bias in one pass.
//
// oneDNN takes some 80 us to find its code for a layer, of which most have less than that to do in a small UNet at a
// batch of 1. A tile is some pixels by 64 channels of the result. Instructions multiply uint8 by int8, so activations are
// shifted by 128 together with their zero point. VNNI adds four products to an int32. AVX2 adds two to an int16, which
// holds sixteen: 16 * 255 * 8 is below 2^15. Compiled and called by compiled.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_GEMM 2
#elif defined(__AVX2__)
#include <immintrin.h>
#define HAS_GEMM 1
#else
#define HAS_GEMM 0
#endif

using std::int32_t;
using std::int64_t;

extern "C" {

// The image is padded. For a linear layer it is one row of pixels.
struct GemmArguments {
    int64_t samples, height, width, channels;             // of x
    int64_t out_height, out_width, out_channels;          // of the result
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
    int64_t upsample;                                     // 1: the image is doubled inside its border of 1
    int64_t timesteps;
};

int dq_has_gemm() { return HAS_GEMM; }

struct QuantizerArguments {  // these two are of single_pass.cpp
    const float* dilation;
    const float* scale;
    const int32_t* zero_point;
    const int32_t* timestep_index;
    int64_t channels, timesteps, bits;
};

void dq_finish(
    int dtype, const float* product, int64_t samples, int64_t rows, int64_t channels, const float* correction,
    const QuantizerArguments* quantizer, const float* bias, const void* channel_add, const void* residual, void* out,
    float* statistics, int threads
);

}  // extern "C"

#if HAS_GEMM

namespace {

constexpr int kRows = HAS_GEMM == 2 ? 6 : 3;  // 24 of the 32 registers hold sums; 12 of the 16
constexpr int64_t kColumns = 64;
constexpr int64_t kChunk = 16 * kRows;        // pixels that use 64 channels' weights while these are in the cache
constexpr int64_t kAloneProducts = 1 << 21;   // fewer products are faster in one thread

inline uint32_t load32(const int8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return four ^ 0x80808080u;
}

inline uint32_t load16(const int8_t* p) {
    uint16_t two;
    std::memcpy(&two, p, 2);
    return two ^ 0x8080u;  // the weights of the other two are 0
}

// A sample's row of the tables; the index of a sample that is not finite is ~row.
inline int64_t row(const GemmArguments& a, int64_t t) {
    t = t < 0 ? ~t : t;
    return t >= a.timesteps ? a.timesteps - 1 : t;
}

struct Gemm {
    const GemmArguments& a;
    const int8_t* x;
    const int8_t* weight;      // of 64 channels each: their sums in int32, then [taps, K / 4, 64, 4]; padded with 0
    const int32_t* weight_sum;
    const float* weight_scale;
    const float* bias;
    float* out;

    int64_t source(int64_t i) const { return a.upsample ? (i + 1) / 2 : i; }

    // The pixels below a tap of the kernel, for the result's pixels first to first + ROWS of a sample.
    template <int ROWS>
    struct Window {
        const Gemm& gemm;
        int64_t sample, top[ROWS], left[ROWS];

        Window(const Gemm& g, int64_t sample_, int64_t first) : gemm(g), sample(sample_) {
            for (int64_t r = 0, h = first / g.a.out_width, column = first % g.a.out_width; r < ROWS; ++r) {
                top[r] = h * g.a.stride_h;
                left[r] = column * g.a.stride_w;
                if (++column == g.a.out_width) ++h, column = 0;
            }
        }

        void at(int64_t kh, int64_t kw, const int8_t* (&pixel)[ROWS]) const {
            const GemmArguments& a = gemm.a;
            for (int r = 0; r < ROWS; ++r) {
                int64_t h = gemm.source(top[r] + kh * a.dilation_h), column = gemm.source(left[r] + kw * a.dilation_w);
                pixel[r] = gemm.x + ((sample * a.height + h) * a.width + column) * a.channels;
            }
        }
    };

#if HAS_GEMM == 2

    // Adds the products of four channels of each pixel.
    template <int ROWS, class F>
    static inline void add(__m512i (&sums)[ROWS][4], const int8_t* w, F four_of) {
        __m512i weights[4];
        for (int j = 0; j < 4; ++j) weights[j] = _mm512_loadu_si512(w + 64 * j);
        for (int r = 0; r < ROWS; ++r) {
            __m512i activations = _mm512_set1_epi32(static_cast<int32_t>(four_of(r)));
            for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], activations, weights[j]);
        }
    }

    // Pixels first to first + ROWS of a sample's result, and 64 channels.
    template <int ROWS>
    void tile(int64_t sample, int64_t first, int64_t panel, float scale, int32_t zero_point) const {
        __m512i sums[ROWS][4];
        for (auto& row : sums)
            for (auto& part : row) part = _mm512_setzero_si512();
        int64_t whole = a.channels / 4, fours = (a.channels + 3) / 4;
        const int8_t* sum = weight + panel * (a.kernel_h * a.kernel_w * fours + 1) * 4 * kColumns;
        const int8_t* w = sum + 4 * kColumns;
        const Window<ROWS> window(*this, sample, first);
        for (int64_t kh = 0; kh < a.kernel_h; ++kh)
            for (int64_t kw = 0; kw < a.kernel_w; ++kw) {
                const int8_t* pixel[ROWS];
                window.at(kh, kw, pixel);
                for (int64_t k = 0; k < whole; ++k, w += 4 * kColumns)
                    add(sums, w, [&](int r) { return load32(pixel[r] + 4 * k); });
                if (whole < fours) {
                    add(sums, w, [&](int r) { return load16(pixel[r] + 4 * whole); });
                    w += 4 * kColumns;
                }
            }
        for (int j = 0; j < 4; ++j) {
            int64_t n = panel * kColumns + 16 * j, number = a.out_channels - n;
            if (number <= 0) break;
            __mmask16 inside = number >= 16 ? 0xffff : static_cast<__mmask16>((1 << number) - 1);
            __m512i shift = _mm512_add_epi32(
                _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(inside, weight_sum + n), _mm512_set1_epi32(zero_point)),
                _mm512_slli_epi32(_mm512_loadu_si512(sum + 64 * j), 7));
            __m512 scale_n = _mm512_maskz_loadu_ps(inside, weight_scale + n);
            __m512 addend = bias ? _mm512_maskz_loadu_ps(inside, bias + n) : _mm512_setzero_ps();
            for (int r = 0; r < ROWS; ++r) {
                // oneDNN's order of the operations with VNNI, so that results do not depend on which of both computes.
                __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][j], shift)), _mm512_set1_ps(scale));
                float* at = out + ((sample * a.out_height * a.out_width) + first + r) * a.out_channels + n;
                _mm512_mask_storeu_ps(at, inside, _mm512_add_ps(_mm512_mul_ps(y, scale_n), addend));
            }
        }
    }

#else

    // Pixels first to first + ROWS of a sample's result, and 64 channels.
    template <int ROWS>
    void tile(int64_t sample, int64_t first, int64_t panel, float scale, int32_t zero_point) const {
        int64_t whole = a.channels / 4, fours = (a.channels + 3) / 4;
        const int8_t* sum = weight + panel * (a.kernel_h * a.kernel_w * fours + 1) * 4 * kColumns;
        const Window<ROWS> window(*this, sample, first);
        const int8_t* pixel[ROWS];
        const __m256i ones = _mm256_set1_epi16(1);
        for (int64_t n = 0; n < kColumns && panel * kColumns + n < a.out_channels; n += 16) {
            __m256i sums[ROWS][2], parts[ROWS][2];
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < 2; ++j) sums[r][j] = parts[r][j] = _mm256_setzero_si256();
            int pending = 0;
            const int8_t* w = sum + 4 * kColumns + 4 * n;
            auto widen = [&] {
                for (int r = 0; r < ROWS; ++r)
                    for (int j = 0; j < 2; ++j) {
                        sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(parts[r][j], ones));
                        parts[r][j] = _mm256_setzero_si256();
                    }
                pending = 0;
            };
            for (int64_t kh = 0; kh < a.kernel_h; ++kh)
                for (int64_t kw = 0; kw < a.kernel_w; ++kw) {
                    window.at(kh, kw, pixel);
                    for (int64_t k = 0; k < fours; ++k, w += 4 * kColumns) {
                        __m256i weights[2];
                        for (int j = 0; j < 2; ++j)
                            weights[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j));
                        for (int r = 0; r < ROWS; ++r) {
                            uint32_t four = k < whole ? load32(pixel[r] + 4 * k) : load16(pixel[r] + 4 * k);
                            __m256i activations = _mm256_set1_epi32(static_cast<int32_t>(four));
                            for (int j = 0; j < 2; ++j)
                                parts[r][j] =
                                    _mm256_add_epi16(parts[r][j], _mm256_maddubs_epi16(activations, weights[j]));
                        }
                        if (++pending == 8) widen();
                    }
                }
            widen();
            for (int j = 0; j < 2; ++j) store_results<ROWS>(sums, j, sample, first, panel * kColumns + n + 8 * j,
                sum + 4 * (n + 8 * j), scale, zero_point);
        }
    }

    // Eight channels from n.
    template <int ROWS>
    void store_results(
        const __m256i (&sums)[ROWS][2], int j, int64_t sample, int64_t first, int64_t n, const int8_t* sum, float scale,
        int32_t zero_point
    ) const {
        if (n >= a.out_channels) return;
        int32_t number = a.out_channels - n < 8 ? static_cast<int32_t>(a.out_channels - n) : 8;
        __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(number), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        __m256i shift = _mm256_add_epi32(
            _mm256_mullo_epi32(_mm256_maskload_epi32(weight_sum + n, inside), _mm256_set1_epi32(zero_point)),
            _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sum)), 7));
        __m256 scale_n = _mm256_maskload_ps(weight_scale + n, inside);
        __m256 addend = bias ? _mm256_maskload_ps(bias + n, inside) : _mm256_setzero_ps();
        // oneDNN's order of the operations without VNNI, as above.
        __m256 factor = _mm256_mul_ps(_mm256_set1_ps(scale), scale_n);
        for (int r = 0; r < ROWS; ++r) {
            __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums[r][j], shift)), factor);
            float* at = out + ((sample * a.out_height * a.out_width) + first + r) * a.out_channels + n;
            _mm256_maskstore_ps(at, inside, _mm256_add_ps(y, addend));
        }
    }

#endif

    void rows(int64_t sample, int64_t first, int64_t count, int64_t panel, float scale, int32_t zero_point) const {
        switch (count) {
            case 1: return tile<1>(sample, first, panel, scale, zero_point);
            case 2: return tile<2>(sample, first, panel, scale, zero_point);
            case 3: return tile<3>(sample, first, panel, scale, zero_point);
            case 4: return tile<4>(sample, first, panel, scale, zero_point);
            case 5: return tile<5>(sample, first, panel, scale, zero_point);
            default: return tile<kRows>(sample, first, panel, scale, zero_point);
        }
    }
};

}  // namespace

extern "C" {

// int8 x [samples, height, width, channels] -> fp32 product [samples, out_height, out_width, out_channels]:
// scale_t weight_scale_n (sum x w - zero_point_t sum w) + bias_n. Samples with a negative timestep index are NaN. What
// follows it is ``finish``, unless out is null.
void dq_multiply(
    const GemmArguments* arguments, const int8_t* x, const int8_t* weight, const int32_t* weight_sum,
    const float* weight_scale, const float* scale, const int32_t* zero_point, const int32_t* timestep_index,
    const float* bias, float* product, int dtype, const void* channel_add, const void* residual, void* out,
    float* statistics, int threads
) {
    const GemmArguments& a = *arguments;
    // A batch of several timesteps has its scales and zero points in ``finish``, as by oneDNN, which takes one of each.
    bool mixed = false;
    for (int64_t i = 1; i < a.samples; ++i) mixed |= row(a, timestep_index[i]) != row(a, timestep_index[0]);
    const Gemm gemm{a, x, weight, weight_sum, weight_scale, mixed ? nullptr : bias, product};
    int64_t pixels = a.out_height * a.out_width, chunks = (pixels + kChunk - 1) / kChunk;
    int64_t panels = (a.out_channels + kColumns - 1) / kColumns;
    int64_t products = a.samples * pixels * a.out_channels * a.channels * a.kernel_h * a.kernel_w;
#pragma omp parallel for num_threads(threads) if (products > kAloneProducts)
    for (int64_t i = 0; i < a.samples * chunks * panels; ++i) {
        int64_t panel = i % panels, sample = i / panels / chunks, first = i / panels % chunks * kChunk;
        int64_t end = first + kChunk < pixels ? first + kChunk : pixels, t = row(a, timestep_index[sample]);
        // A scale that is NaN makes NaN of all results.
        float factor = timestep_index[sample] < 0 ? std::nanf("") : mixed ? 1.0f : scale[t];
        for (; first < end; first += kRows) {
            gemm.rows(sample, first, end - first, panel, factor, mixed ? 0 : zero_point[t]);
        }
    }
    if (mixed) {
        std::vector<float> correction(a.out_channels);
        for (int64_t n = 0; n < a.out_channels; ++n) correction[n] = static_cast<float>(weight_sum[n]) * weight_scale[n];
        const QuantizerArguments quantizer{nullptr, scale, zero_point, timestep_index, 0, a.timesteps, 8};
        dq_finish(out ? dtype : 0, product, a.samples, pixels, a.out_channels, correction.data(), &quantizer, bias,
            channel_add, residual, out ? out : product, statistics, threads);
    } else if (out) {
        dq_finish(dtype, product, a.samples, pixels, a.out_channels, nullptr, nullptr, nullptr, channel_add, residual,
            out, statistics, threads);
    }
}

}  // extern "C"

#else

extern "C" void dq_multiply(
    const GemmArguments*, const int8_t*, const int8_t*, const int32_t*, const float*, const float*, const int32_t*,
    const int32_t*, const float*, float*, int, const void*, const void*, void*, float*, int
) {}

#endif
