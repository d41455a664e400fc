// The elementwise parts of the INT4 operators on CPUs, each as one pass over memory.
//
// Plain torch reads and writes a tensor once for each of some ten steps of a quantization; these functions do all steps
// while a row is in the cache. The formulas and their order are those of kernels/reference.py, in fp32 without fused
// multiply-adds. Images are channels last: rows = pixels, [samples, rows, channels]. All tensors are contiguous.
// Compiled and called by compiled.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using std::int32_t;
using std::int64_t;

namespace {

constexpr int64_t kRun = 64;          // STATISTICS_ROWS
constexpr int64_t kAlone = 1 << 14;   // elements below which one thread is faster than several
constexpr int64_t kLanes = 16;

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
    uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    float y = as_float(magnitude) * 0x1p112f;  // moves the exponent's bias; exact for subnormal numbers, too
    y = magnitude >= 0x0f800000 ? as_float(magnitude | 0x7f800000) : y;
    return as_float(as_bits(y) | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounded to the nearest, ties to even. NaN stays NaN.
inline void store(float* p, float x) { *p = x; }
inline void store(bfloat16* p, float x) {
    uint32_t bits = as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}
inline void store(float16* p, float x) {
    uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
    uint32_t normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000;  // the sum's last bit is 2^-24
    uint32_t half = bits < 0x38800000 ? subnormal : bits >= 0x477ff000 ? 0x7c00 : normal;
    p->bits = static_cast<uint16_t>(sign | (bits > 0x7f800000 ? 0x7e00 : half));
}

// exp in fp32 with an error of 2 ulp: 2^n e^r with |r| <= ln(2) / 2. NaN stays NaN.
inline float exp_(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    clamped = clamped > 88.0f ? 88.0f : clamped;
    float n = std::floor(clamped * 1.44269504f + 0.5f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float power = as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
    return x != x ? x : p * power;
}

inline float silu(float x) { return x / (1.0f + exp_(-x)); }

// x Phi(x); erf by formula 7.1.26 of Abramowitz and Stegun (error 1.5e-7), as in the Triton kernel.
inline float gelu(float x) {
    float z = std::fabs(x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float polynomial = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * polynomial * exp_(-z * z);
    return x * (x < 0 ? tail : 1.0f - tail);
}

// The quantizer of one sample. NaN becomes the lowest value.
struct Step {
    float inverse_scale, zero_point, low, high;

    int8_t operator()(float x, float inverse_dilation) const {
        float q = std::floor(x * inverse_dilation * inverse_scale + 0.5f) + zero_point;
        q = q > low ? q : low;
        q = q < high ? q : high;
        return static_cast<int8_t>(static_cast<int32_t>(q));
    }
};

struct Quantizer {
    std::vector<float> inverse_dilation;
    const float* scale;
    const int32_t* zero_point;
    int32_t* timestep_index;
    int64_t timesteps;
    float low, high;

    // The index of a sample that is not finite is ~row, and may become so while other threads read it.
    int64_t row(int64_t sample) const {
        int64_t t = __atomic_load_n(timestep_index + sample, __ATOMIC_RELAXED);
        t = t < 0 ? ~t : t;
        return t >= timesteps ? timesteps - 1 : t;
    }

    Step of(int64_t sample) const {
        return {1.0f / scale[row(sample)], static_cast<float>(zero_point[row(sample)]), low, high};
    }

    // Given the largest bits without sign of a sample's values, which are infinity's or more for infinity and NaN.
    void mark_not_finite(int64_t sample, uint32_t largest) const {
        if (largest >= 0x7f800000) {
            __atomic_store_n(timestep_index + sample, ~static_cast<int32_t>(row(sample)), __ATOMIC_RELAXED);
        }
    }
};

// y[k] = f(x[k]) for the channels of one row, quantized; an odd channel count gets one quantized zero. Returns the
// largest bits of a y without sign: a maximum of integers is vectorized, a sum of floats would not be.
template <class F>
inline uint32_t quantize_row(
    int8_t* out, int64_t channels, int64_t padded, const float* inverse_dilation, Step step, F f
) {
    uint32_t largest = 0;
    for (int64_t k = 0; k < channels; ++k) {
        float y = f(k);
        uint32_t bits = as_bits(y) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
        out[k] = step(y, inverse_dilation[k]);
    }
    if (padded > channels) out[channels] = step(0.0f, 1.0f);
    return largest;
}

// Sum and centred sum of squares of each channel over n rows, in double only across runs: a run has 64 rows at most.
template <class T>
void run_statistics(const T* x, int64_t n, int64_t channels, float* total, float* centred) {
    for (int64_t k = 0; k < channels; ++k) total[k] = centred[k] = 0.0f;
    for (int64_t r = 0; r < n; ++r)
        for (int64_t k = 0; k < channels; ++k) total[k] += to_float(x[r * channels + k]);
    for (int64_t r = 0; r < n; ++r)
        for (int64_t k = 0; k < channels; ++k) {
            float d = to_float(x[r * channels + k]) - total[k] / static_cast<float>(n);
            centred[k] += d * d;
        }
}

template <class T>
void image_statistics(const T* x, int64_t samples, int64_t rows, int64_t channels, float* statistics, int threads) {
    int64_t runs = (rows + kRun - 1) / kRun;
#pragma omp parallel for num_threads(threads) if (samples * rows * channels > kAlone)
    for (int64_t i = 0; i < samples * runs; ++i) {
        int64_t first = i % runs * kRun, n = rows - first < kRun ? rows - first : kRun;
        float* entry = statistics + i * 2 * channels;
        run_statistics(x + (i / runs * rows + first) * channels, n, channels, entry, entry + channels);
    }
}

// Mean and 1 / sqrt(variance + eps) of every group of one sample, from the run statistics of x beside skip.
void group_moments(
    const float* const statistics[2], const int64_t channels[2], int64_t sample, int64_t rows, int64_t groups, float eps,
    float* mean, float* inverse_deviation
) {
    int64_t runs = (rows + kRun - 1) / kRun, group_size = (channels[0] + channels[1]) / groups;
    for (int64_t g = 0; g < groups; ++g) {
        double total = 0, centred = 0;
        for (int pass = 0; pass < 2; ++pass) {
            double average = total / (static_cast<double>(group_size) * rows);
            for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
                int source = c >= channels[0];
                int64_t width = channels[source], k = source ? c - channels[0] : c;
                const float* entry = statistics[source] + sample * runs * 2 * width + k;
                for (int64_t run = 0; run < runs; ++run, entry += 2 * width) {
                    double n = rows - run * kRun < kRun ? rows - run * kRun : kRun;
                    if (pass == 0) {
                        total += entry[0];
                    } else {
                        double d = entry[0] / n - average;
                        centred += entry[width] + n * d * d;
                    }
                }
            }
        }
        mean[g] = static_cast<float>(total / (static_cast<double>(group_size) * rows));
        double variance = centred / (static_cast<double>(group_size) * rows);
        inverse_deviation[g] = static_cast<float>(1.0 / std::sqrt(variance + eps));
    }
}

// A padded int8 image of which F fills the rows: f(sample, row, out).
template <class F>
void fill_image(
    int8_t* out, int64_t samples, int64_t height, int64_t width, int64_t padded, int64_t pad_h, int64_t pad_w,
    const Quantizer& quantizer, int threads, F f
) {
    int64_t out_h = height + 2 * pad_h, out_w = width + 2 * pad_w;
#pragma omp parallel for num_threads(threads) if (samples * height * width * padded > kAlone)
    for (int64_t i = 0; i < samples * out_h; ++i) {
        int64_t sample = i / out_h, h = i % out_h - pad_h;
        int8_t* line = out + i * out_w * padded;
        int8_t zero = quantizer.of(sample)(0.0f, 1.0f);
        if (h < 0 || h >= height) {
            std::memset(line, zero, out_w * padded);
            continue;
        }
        std::memset(line, zero, pad_w * padded);
        std::memset(line + (pad_w + width) * padded, zero, pad_w * padded);
        f(sample, h * width, line + pad_w * padded);
    }
}

template <class T>
void quantize(
    const T* x, int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t pad_h, int64_t pad_w,
    const Quantizer& quantizer, int8_t* out, int threads
) {
    int64_t padded = channels + channels % 2;
    const float* inverse = quantizer.inverse_dilation.data();
    fill_image(out, samples, height, width, padded, pad_h, pad_w, quantizer, threads,
        [&](int64_t sample, int64_t row, int8_t* line) {
            Step step = quantizer.of(sample);
            for (int64_t w = 0; w < width; ++w, line += padded) {
                int64_t pixel = sample * height * width + row + w;
                const T* source = x + pixel * channels;
                quantizer.mark_not_finite(sample, quantize_row(
                    line, channels, padded, inverse, step, [=](int64_t k) { return to_float(source[k]); }));
            }
        });
}

template <class T, bool SILU>
uint32_t normalize_row(
    int8_t* out, const T* x, int64_t channels, const float* mean, const float* factor, const float* offset,
    const float* inverse_dilation, Step step
) {
    return quantize_row(out, channels, channels, inverse_dilation, step, [=](int64_t k) {
        float y = (to_float(x[k]) - mean[k]) * factor[k] + offset[k];
        return SILU ? silu(y) : y;
    });
}

template <class T>
void group_norm_quantize(
    const T* x, const T* skip, int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t skip_channels,
    int64_t groups, const float* weight, const float* bias, float eps, bool with_silu, const float* known,
    const float* skip_known, int64_t pad_h, int64_t pad_w, const Quantizer& quantizer, int8_t* out,
    const Quantizer* plain_quantizer, int8_t* plain_out, int threads
) {
    int64_t rows = height * width, runs = (rows + kRun - 1) / kRun, all = channels + skip_channels;
    const int64_t widths[2] = {channels, skip_channels};
    const T* sources[2] = {x, skip};
    const float* statistics[2] = {known, skip_known};
    std::vector<float> own[2];
    for (int i = 0; i < 2; ++i)
        if (widths[i] && !statistics[i]) {
            own[i].resize(samples * runs * 2 * widths[i]);
            image_statistics(sources[i], samples, rows, widths[i], own[i].data(), threads);
            statistics[i] = own[i].data();
        }
    std::vector<float> parameters(samples * 3 * all);  // mean, factor and offset of each sample's channels
#pragma omp parallel for num_threads(threads) if (samples * rows * all > kAlone)
    for (int64_t sample = 0; sample < samples; ++sample) {
        std::vector<float> mean(groups), inverse_deviation(groups);
        group_moments(statistics, widths, sample, rows, groups, eps, mean.data(), inverse_deviation.data());
        float* p = parameters.data() + sample * 3 * all;
        for (int64_t c = 0; c < all; ++c) {
            int64_t g = c / (all / groups);
            p[c] = mean[g];
            p[all + c] = inverse_deviation[g] * (weight ? weight[c] : 1.0f);
            p[2 * all + c] = bias ? bias[c] : 0.0f;
        }
    }
    const float* inverse = quantizer.inverse_dilation.data();
    fill_image(out, samples, height, width, all, pad_h, pad_w, quantizer, threads,
        [&](int64_t sample, int64_t row, int8_t* line) {
            Step step = quantizer.of(sample);
            const float* p = parameters.data() + sample * 3 * all;
            auto normalize = with_silu ? normalize_row<T, true> : normalize_row<T, false>;
            for (int64_t w = 0; w < width; ++w, line += all) {
                int64_t pixel = sample * rows + row + w;
                quantizer.mark_not_finite(sample, normalize(
                    line, x + pixel * channels, channels, p, p + all, p + 2 * all, inverse, step));
                quantizer.mark_not_finite(sample, normalize(
                    line + channels, skip + pixel * skip_channels, skip_channels, p + channels, p + all + channels,
                    p + 2 * all + channels, inverse + channels, step));
                if (plain_quantizer) {
                    const float* plain_inverse = plain_quantizer->inverse_dilation.data();
                    Step plain_step = plain_quantizer->of(sample);
                    for (int64_t k = 0; k < channels; ++k)
                        plain_out[pixel * all + k] = plain_step(to_float(x[pixel * channels + k]), plain_inverse[k]);
                    for (int64_t k = 0; k < skip_channels; ++k)
                        plain_out[pixel * all + channels + k] =
                            plain_step(to_float(skip[pixel * skip_channels + k]), plain_inverse[channels + k]);
                }
            }
        });
}

template <class T>
void layer_norm_quantize(
    const T* x, int64_t samples, int64_t rows, int64_t channels, const float* weight, const float* bias, float eps,
    const Quantizer& quantizer, int8_t* out, int threads
) {
    int64_t padded = channels + channels % 2;
    const float* inverse = quantizer.inverse_dilation.data();
#pragma omp parallel num_threads(threads) if (samples * rows * channels > kAlone)
    {
        std::vector<float> row(channels);
#pragma omp for
        for (int64_t i = 0; i < samples * rows; ++i) {
            float partial[kLanes] = {}, squares[kLanes] = {};
            float* v = row.data();
            for (int64_t k = 0; k < channels; ++k) v[k] = to_float(x[i * channels + k]);
            int64_t whole = channels / kLanes * kLanes;
            for (int64_t k = 0; k < whole; k += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += v[k + lane];
            for (int64_t k = whole; k < channels; ++k) partial[k - whole] += v[k];
            double total = 0;
            for (float part : partial) total += part;
            float mean = static_cast<float>(total / channels);
            for (int64_t k = 0; k < channels; ++k) v[k] -= mean;
            for (int64_t k = 0; k < whole; k += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane) squares[lane] += v[k + lane] * v[k + lane];
            for (int64_t k = whole; k < channels; ++k) squares[k - whole] += v[k] * v[k];
            double variance = 0;
            for (float part : squares) variance += part;
            float inverse_deviation = static_cast<float>(1.0 / std::sqrt(variance / channels + eps));
            uint32_t largest = quantize_row(out + i * padded, channels, padded, inverse, quantizer.of(i / rows),
                [=](int64_t k) {
                    return v[k] * inverse_deviation * (weight ? weight[k] : 1.0f) + (bias ? bias[k] : 0.0f);
                });
            quantizer.mark_not_finite(i / rows, largest);
        }
    }
}

// The end of a GEMM, product [samples, rows, channels]: adds what is not null; writes out and its statistics. out may
// be the product itself. The product is finished already if correction is null. Otherwise it is sum q_x q_w times the
// weight scale, the correction is the weight sum times the weight scale, and y = act_scale (product - zero_point
// correction).
template <class T>
void finish(
    const float* product, int64_t samples, int64_t rows, int64_t channels, const float* correction,
    const Quantizer& quantizer, const float* bias, const T* channel_add, const T* residual, T* out, float* statistics,
    int threads
) {
    int64_t runs = (rows + kRun - 1) / kRun;
#pragma omp parallel num_threads(threads) if (samples * rows * channels > kAlone)
    {
        std::vector<float> addend(channels);
#pragma omp for
        for (int64_t i = 0; i < samples * runs; ++i) {
            int64_t sample = i / runs, first = i % runs * kRun, n = rows - first < kRun ? rows - first : kRun;
            float scale = correction ? quantizer.scale[quantizer.row(sample)] : 1.0f;
            float zero_point = correction ? static_cast<float>(quantizer.zero_point[quantizer.row(sample)]) : 0.0f;
            float* a = addend.data();
            for (int64_t k = 0; k < channels; ++k)
                a[k] = (bias ? bias[k] : 0.0f) + (channel_add ? to_float(channel_add[sample * channels + k]) : 0.0f);
            for (int64_t at = (sample * rows + first) * channels, r = 0; r < n; ++r, at += channels) {
                const float* p = product + at;
                const T* other = residual + at;
                T* y = out + at;
                if (correction && residual)
                    for (int64_t k = 0; k < channels; ++k)
                        store(y + k, scale * (p[k] - zero_point * correction[k]) + a[k] + to_float(other[k]));
                else if (correction)
                    for (int64_t k = 0; k < channels; ++k)
                        store(y + k, scale * (p[k] - zero_point * correction[k]) + a[k]);
                else if (residual)
                    for (int64_t k = 0; k < channels; ++k) store(y + k, p[k] + a[k] + to_float(other[k]));
                else
                    for (int64_t k = 0; k < channels; ++k) store(y + k, p[k] + a[k]);
            }
            if (statistics) {
                float* entry = statistics + i * 2 * channels;
                run_statistics(out + (sample * rows + first) * channels, n, channels, entry, entry + channels);
            }
        }
    }
}

}  // namespace

// The interface: dtypes are 0 for fp32, 1 for bf16 and 2 for fp16; absent tensors are null pointers.
#define DISPATCH(dtype, call)                            \
    if ((dtype) == 0) { using T = float; call; }         \
    else if ((dtype) == 1) { using T = bfloat16; call; } \
    else { using T = float16; call; }

extern "C" {

struct QuantizerArguments {
    const float* dilation;
    const float* scale;
    const int32_t* zero_point;
    int32_t* timestep_index;
    int64_t channels, timesteps, bits;
};

static Quantizer unpack(const QuantizerArguments* a) {
    if (!a) return {};
    Quantizer q{{}, a->scale, a->zero_point, a->timestep_index, a->timesteps,
        -std::ldexp(1.0f, static_cast<int>(a->bits) - 1), std::ldexp(1.0f, static_cast<int>(a->bits) - 1) - 1};
    q.inverse_dilation.resize(a->channels);
    for (int64_t k = 0; k < a->channels; ++k) q.inverse_dilation[k] = 1.0f / a->dilation[k];
    return q;
}

void dq_quantize(
    int dtype, const void* x, int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t pad_h,
    int64_t pad_w, const QuantizerArguments* quantizer, int8_t* out, int threads
) {
    DISPATCH(dtype, quantize(static_cast<const T*>(x), samples, height, width, channels, pad_h, pad_w, unpack(quantizer),
        out, threads))
}

void dq_group_norm_quantize(
    int dtype, const void* x, const void* skip, int64_t samples, int64_t height, int64_t width, int64_t channels,
    int64_t skip_channels, int64_t groups, const float* weight, const float* bias, float eps, int with_silu,
    const float* statistics, const float* skip_statistics, int64_t pad_h, int64_t pad_w,
    const QuantizerArguments* quantizer, int8_t* out, const QuantizerArguments* plain_quantizer, int8_t* plain_out,
    int threads
) {
    Quantizer plain = unpack(plain_quantizer);
    DISPATCH(dtype, group_norm_quantize(static_cast<const T*>(x), static_cast<const T*>(skip), samples, height, width,
        channels, skip_channels, groups, weight, bias, eps, with_silu != 0, statistics, skip_statistics, pad_h, pad_w,
        unpack(quantizer), out, plain_quantizer ? &plain : nullptr, plain_out, threads))
}

void dq_layer_norm_quantize(
    int dtype, const void* x, int64_t samples, int64_t rows, int64_t channels, const float* weight, const float* bias,
    float eps, const QuantizerArguments* quantizer, int8_t* out, int threads
) {
    DISPATCH(dtype, layer_norm_quantize(static_cast<const T*>(x), samples, rows, channels, weight, bias, eps,
        unpack(quantizer), out, threads))
}

// product [samples, rows, 2 channels]: hidden beside gate -> int8 [samples, rows, channels].
void dq_geglu_quantize(
    const float* product, int64_t samples, int64_t rows, int64_t channels, const QuantizerArguments* arguments,
    int8_t* out, int threads
) {
    Quantizer quantizer = unpack(arguments);
    const float* inverse = quantizer.inverse_dilation.data();
    int64_t padded = channels + channels % 2;
#pragma omp parallel for num_threads(threads) if (samples * rows * channels > kAlone)
    for (int64_t i = 0; i < samples * rows; ++i) {
        const float *hidden = product + i * 2 * channels, *gate = hidden + channels;
        quantize_row(out + i * padded, channels, padded, inverse, quantizer.of(i / rows),
            [=](int64_t k) { return hidden[k] * gelu(gate[k]); });
    }
}

// As ``finish``.
void dq_finish(
    int dtype, const float* product, int64_t samples, int64_t rows, int64_t channels, const float* correction,
    const QuantizerArguments* quantizer, const float* bias, const void* channel_add, const void* residual, void* out,
    float* statistics, int threads
) {
    DISPATCH(dtype, finish(product, samples, rows, channels, correction, unpack(quantizer), bias,
        static_cast<const T*>(channel_add), static_cast<const T*>(residual), static_cast<T*>(out), statistics, threads))
}

}  // extern "C"
