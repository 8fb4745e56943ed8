// Selective scan, forward and backward, for one instruction set: compile with the flags of the set that is wanted
// (none: 4 lanes, -mavx2 -mfma: 8, -mavx512f -mavx512dq: 16). Plain C interface, no dependency.
//
// Lanes are channels: B[t] and C[t] are scalars to all of them, states never meet, so nothing is summed across lanes in
// the forward pass. 16 channels are a block: one cache line of a channels-last row, and enough vectors that the long
// chain of one exponential hides behind the others. Time is cut in chunks of 32 steps; u and delta of a chunk and block
// are brought into small tiles (time x lanes) whatever their strides, then a few states at a time run over the tile from
// registers, while the next block is fetched. Backward keeps only the state before every chunk, recomputes decays and
// states of one chunk, and runs the adjoint backwards. Sums over time (dA, dD, dbias, dW) are float32 inside a chunk and
// float64 across chunks.
//
// A direction is an order in which the positions of one map are visited: forward, reverse, or a table of positions.
// All directions of a map read u in place and add into the same y. u, delta, B and C may be 16-bit numbers: they become
// float32 in the tiles, and everything that is written is float32.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;
#elif defined(__AVX2__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
constexpr int T = 32;     // steps in a chunk
constexpr int W = 16;     // channels in a block on every machine; border states are stored for whole blocks
constexpr int U = W / V;  // vectors in a block
constexpr int AHEAD = U == 4 ? 2 : 4, BACK = U == 1 ? 4 : 2;  // states that run together: what the registers hold
#define APART __attribute__((noinline))  // registers of its own
typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef float Tile[T][W] __attribute__((aligned(64)));

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

inline float bits_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, sizeof x); return x; }
inline uint32_t float_as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, sizeof bits); return bits; }
inline float number(float x) { return x; }
inline float number(Bfloat x) { return bits_as_float(uint32_t(x.bits) << 16); }
inline float number(Half x) {  // moved into place and rescaled by 2^112, exact for subnormals too; all ones stay all ones
    const uint32_t low = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t bits = low >= 0x0f800000u ? low | 0x7f800000u : float_as_bits(bits_as_float(low) * 0x1p112f);
    return bits_as_float(bits | sign);
}

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
template <class X> inline vf load(const X* p) { float v[V]; for (int i = 0; i < V; ++i) v[i] = number(p[i]); return load(v); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return vf{} + x; }
inline float total(vf v) { float s = 0; for (int i = 0; i < V; ++i) s += v[i]; return s; }

// Larger and smaller of a bound and x; a NaN in x stays.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline vf maxv(vf bound, vf x) { return (vf)_mm256_max_ps((__m256)bound, (__m256)x); }
inline vf minv(vf bound, vf x) { return (vf)_mm256_min_ps((__m256)bound, (__m256)x); }
#else
inline vf maxv(vf bound, vf x) { return x < bound ? bound : x; }
inline vf minv(vf bound, vf x) { return x > bound ? bound : x; }
#endif

// 2^r for |r| <= 1/2, relative error 2e-9 before rounding, 2^0 == 1 exactly.
inline vf exp2_part(vf r) {
    vf p = all(0.0001535336196f) * r + 0.0013398875017f;
    p = p * r + 0.0096184369177f;
    p = p * r + 0.0555033236742f;
    p = p * r + 0.2402264773846f;
    p = p * r + 0.6931471824646f;
    return p * r + 1.f;
}

constexpr float LIMIT = 126.f;  // 2^x of |x| <= LIMIT needs no care

// 2^(d a). CARE: NaN stays NaN, overflow saturates, underflow is 1e-38; without it |d a| must not exceed LIMIT.
template <bool CARE>
inline vf decay(vf d, vf a) {
#if defined(__AVX512F__)
    const vf x = d * a, k = (vf)_mm512_roundscale_ps((__m512)x, 8);
    return (vf)_mm512_scalef_ps((__m512)exp2_part(x - k), (__m512)k);
#else
    const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
    vf shifted, r;
    if (CARE) {
        const vf x = minv(all(127.9999f), maxv(all(-LIMIT), d * a));
        shifted = x + magic;
        r = x - (shifted - magic);
    } else {
        shifted = d * a + magic;
        r = d * a - (shifted - magic);
    }
    return (vf)((vi)exp2_part(r) + ((vi)shifted << 23));
#endif
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|), by a polynomial of relative error 3e-8; slope = sigmoid(x).
template <bool SLOPE>
inline vf softplus(vf x, vf* slope) {
    const vf e = decay<true>((vf)((vi)x | INT32_MIN), all(LOG2E)), q = e * e;
    vf even = all(0.005232689902f) * q + 0.07822592556f, odd = all(-0.02950522117f) * q - 0.1366324276f;
    even = even * q + 0.1910600513f;
    odd = odd * q - 0.2484298199f;
    even = even * q + 0.3331909776f;
    odd = odd * q - 0.4999949336f;
    even = even * q + 0.9999999404f;
    if (SLOPE) *slope = (x < all(0.f) ? e : all(1.f)) / (e + 1.f);
    return maxv(all(0.f), x) + (odd * e + even) * e;
}

// In-place transpose of V rows.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline void transpose(vf* m) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_ps((__m256)m[2 * i], (__m256)m[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps((__m256)m[2 * i], (__m256)m[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
        }
    for (int i = 0; i < 4; ++i) {
        m[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        m[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
inline void transpose(vf* m) {
    vi low, high;
    for (int i = 0; i < V; ++i) { low[i] = i / 2 + (i & 1) * V; high[i] = low[i] + V / 2; }
    for (int round = 1; round < V; round *= 2) {
        vf next[V];
        for (int i = 0; i < V / 2; ++i) {
#if defined(__clang__)
            for (int l = 0; l < V; ++l) {
                next[2 * i][l] = l & 1 ? m[i + V / 2][l / 2] : m[i][l / 2];
                next[2 * i + 1][l] = l & 1 ? m[i + V / 2][V / 2 + l / 2] : m[i][V / 2 + l / 2];
            }
#else
            next[2 * i] = __builtin_shuffle(m[i], m[i + V / 2], low);
            next[2 * i + 1] = __builtin_shuffle(m[i], m[i + V / 2], high);
#endif
        }
        std::memcpy(m, next, sizeof next);
    }
}
#endif

}  // namespace

extern "C" {

// Strides are in elements. K directions, G groups of `width` channels, N states, R rank of delta (0: delta is given whole).
struct ScanShape {
    int64_t batch, directions, groups, width, states, rank, length, softplus, reverse_mask;
    int64_t kind, add;               // u, delta, B, C are 0: float32, 1: bfloat16, 2: float16; add: into what y holds
    int64_t ub, ul, uc;              // u
    int64_t yb, yl, yc;              // y; backward: du
    int64_t gb, gl, gc;              // dy
    int64_t db, dk, dl, dc;          // delta (or its rank form)
    int64_t fb, fk, fl, fc;          // ddelta (not of the rank form: (splits * G, B, K, L, R), contiguous)
    int64_t Bb, Bk, Bg, Bl, Bn;
    int64_t Cb, Ck, Cg, Cl, Cn;
    const int32_t* order;            // (K, L) positions, or null: forward, or reverse where reverse_mask has bit k
    const void *u, *delta, *B, *C;
    const float *weight, *A, *D, *bias, *initial;  // weight (K, GD, R), A (K, GD, N), D, bias (K, GD)
    float *y, *last, *borders;       // last (B, K, GD, N); borders (B, K, chunks, G, padded width * N) or null
    const float *dy, *dlast;
    float *du, *ddelta, *dB, *dC, *dinitial;   // dB, dC: (splits, ...) copies `part` elements apart, strides as below
    int64_t eb, ek, eg, el, en, part;          // strides of dB and dC
    double *dA, *dD, *dbias, *dweight;         // (B, K, GD, N), (B, K, GD), (B, K, GD), (B, K, GD, R)
};

int scan_lanes() { return W; }

}  // extern "C"

namespace {

struct Chunk {
    int steps;
    int64_t at[T];  // positions visited
    int run;        // +1 or -1: consecutive positions; 0: any
};

inline Chunk chunk_at(const ScanShape& s, int64_t k, int64_t index) {
    Chunk c;
    c.steps = 0;
    const int64_t first = index * T;
    if (first < 0 || first >= s.length) return c;
    c.steps = int(s.length - first < T ? s.length - first : T);
    const bool back = !s.order && (s.reverse_mask >> k & 1);
    c.run = s.order ? 0 : back ? -1 : 1;
    for (int t = 0; t < c.steps; ++t)
        c.at[t] = s.order ? s.order[k * s.length + first + t] : back ? s.length - 1 - first - t : first + t;
    return c;
}

// Tile of `count` channels from base + position * stride + channel * cstride; missing lanes are zero.
template <class X>
APART void read_tile_of(const X* base, int64_t stride, int64_t cstride, int count, const Chunk& c, Tile tile) {
    if (cstride == 1 && count == W) {
        for (int t = 0; t < c.steps; ++t)
            for (int l = 0; l < W; l += V) store(tile[t] + l, load(base + c.at[t] * stride + l));
        return;
    }
    int t = 0;
    if (count == W && c.run && stride == 1)
        for (; t + V <= c.steps; t += V)
            for (int l = 0; l < W; l += V) {
                vf m[V];
                const X* from = base + (c.run > 0 ? c.at[t] : c.at[t + V - 1]) + l * cstride;
                for (int i = 0; i < V; ++i) m[i] = load(from + i * cstride);
                transpose(m);
                for (int i = 0; i < V; ++i) store(tile[t + i] + l, m[c.run > 0 ? i : V - 1 - i]);
            }
    for (; t < c.steps; ++t) {
        const X* from = base + c.at[t] * stride;
        for (int i = 0; i < count; ++i) tile[t][i] = number(from[i * cstride]);
        for (int i = count; i < W; ++i) tile[t][i] = 0;
    }
}

APART void write_tile(float* base, int64_t stride, int64_t cstride, int count, const Chunk& c, bool add, Tile tile) {
    if (cstride == 1 && count == W) {
        for (int t = 0; t < c.steps; ++t) {
            float* to = base + c.at[t] * stride;
            for (int l = 0; l < W; l += V) store(to + l, add ? load(tile[t] + l) + load(to + l) : load(tile[t] + l));
        }
        return;
    }
    int t = 0;
    if (count == W && c.run && stride == 1)
        for (; t + V <= c.steps; t += V)
            for (int l = 0; l < W; l += V) {
                vf m[V];
                float* to = base + (c.run > 0 ? c.at[t] : c.at[t + V - 1]) + l * cstride;
                for (int i = 0; i < V; ++i) m[c.run > 0 ? i : V - 1 - i] = load(tile[t + i] + l);
                transpose(m);
                for (int i = 0; i < V; ++i) store(to + i * cstride, add ? m[i] + load(to + i * cstride) : m[i]);
            }
    for (; t < c.steps; ++t) {
        float* to = base + c.at[t] * stride;
        for (int i = 0; i < count; ++i) to[i * cstride] = tile[t][i] + (add ? to[i * cstride] : 0.f);
    }
}

// B, C or the rank form of delta of a chunk as (steps, count); asks for the rows of the next chunk.
template <class X>
APART void read_rows_of(const X* base, int64_t stride, int64_t nstride, int64_t count, const Chunk& c, const Chunk& next,
                         float* rows) {
    if (nstride == 1)
        for (int t = 0; t < c.steps; ++t) {
            if (t < next.steps) __builtin_prefetch(base + next.at[t] * stride);
            for (int64_t n = 0; n < count; ++n) rows[t * count + n] = number(base[c.at[t] * stride + n]);
        }
    else
        for (int64_t n = 0; n < count; ++n)
            for (int t = 0; t < c.steps; ++t) rows[t * count + n] = number(base[c.at[t] * stride + n * nstride]);
}

// The readers for the kind of number that u, delta, B and C hold; `offset` in elements.
template <class Call>
inline void with_kind(const ScanShape& s, const void* base, int64_t offset, Call call) {
    if (s.kind == 0) call(static_cast<const float*>(base) + offset);
    else if (s.kind == 1) call(static_cast<const Bfloat*>(base) + offset);
    else call(static_cast<const Half*>(base) + offset);
}

inline void read_tile(const ScanShape& s, const void* base, int64_t offset, int64_t stride, int64_t cstride, int count,
                      const Chunk& c, Tile tile) {
    with_kind(s, base, offset, [&](auto* from) { read_tile_of(from, stride, cstride, count, c, tile); });
}

inline void read_rows(const ScanShape& s, const void* base, int64_t offset, int64_t stride, int64_t nstride,
                      int64_t count, const Chunk& c, const Chunk& next, float* rows) {
    with_kind(s, base, offset, [&](auto* from) { read_rows_of(from, stride, nstride, count, c, next, rows); });
}

// Sum the lanes of (steps, count, V) into base + position * stride + n * nstride.
APART void write_rows(float* base, int64_t stride, int64_t nstride, int64_t count, const Chunk& c, const float* lanes) {
    for (int t = 0; t < c.steps; ++t, lanes += count * V) {
        float* to = base + c.at[t] * stride;
        int64_t n = 0;
        for (; n + V <= count; n += V) {
            vf m[V], sum{};
            for (int i = 0; i < V; ++i) m[i] = load(lanes + (n + i) * V);
            transpose(m);
            for (int i = 0; i < V; ++i) sum += m[i];
            for (int i = 0; i < V; ++i) to[(n + i) * nstride] = sum[i];
        }
        for (; n < count; ++n) to[n * nstride] = total(load(lanes + n * V));
    }
}

// A tile that the next block will read or write, asked for one line at a time while this block is worked on.
struct Fetch {
    const char* base;
    int64_t stride, cstride;  // in bytes
    bool rows;                // a row of the block is one line; else a channel's chunk is two
    Fetch(const void* array, int size, int64_t offset, int64_t stride_, int64_t cstride_)
        : base(static_cast<const char*>(array) + offset * size), stride(stride_ * size), cstride(cstride_ * size),
          rows(cstride_ == 1) {}
    // Inlined by force: a compiler may take a function that only fetches for one without effect and drop its calls.
    __attribute__((always_inline)) void line(const Chunk& c, int t) const {
        if (rows) { if (t < c.steps) __builtin_prefetch(base + c.at[t] * stride); }
        else if (c.steps == T) __builtin_prefetch(base + c.at[c.run < 0 ? T - 1 : 0] * stride + (t / 2) * cstride + (t & 1) * 64);
    }
};

// (channels, count) row-major <-> (count, W): `count` numbers of each of the `n` channels that are there.
inline void pack(const float* from, int64_t count, int n, float scale, float* to) {
    for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < W; ++i) to[j * W + i] = i < n && from ? from[i * count + j] * scale : 0.f;
}

template <class X>
inline void unpack(const X* from, int64_t count, int n, X* to) {
    for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < n; ++i) to[i * count + j] = from[j * W + i];
}

inline void add_double(double* into, vf v) { for (int i = 0; i < V; ++i) into[i] += v[i]; }

struct Scratch {  // one aligned allocation, cut in pieces
    char* memory;
    size_t used = 0;
    explicit Scratch(size_t bytes) {
        void* p = nullptr;
        memory = posix_memalign(&p, 64, bytes) == 0 ? static_cast<char*>(p) : nullptr;
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    template <class X> X* take(size_t count) {
        X* p = reinterpret_cast<X*>(memory + used);
        used += (count * sizeof(X) + 63) / 64 * 64;
        return p;
    }
};

// Decays of one state over a chunk.
template <bool CARE>
APART void run_decays(int steps, const Tile dt, const float* a, Tile decays) {
    vf a_[U];
    for (int u = 0; u < U; ++u) a_[u] = load(a + u * V);
#pragma GCC unroll 2
    for (int t = 0; t < steps; ++t)
        for (int u = 0; u < U; ++u) store(decays[t] + u * V, decay<CARE>(load(dt[t] + u * V), a_[u]));
}

// J states over a chunk: h = decay h + du B, y += C h.
template <int J>
APART void run_forward(int steps, const Tile* decays, const Tile du, Tile y, float* state, const float* B,
                       const float* C, int64_t N) {
    vf h[J][U];
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) h[j][u] = load(state + j * W + u * V);
    for (int t = 0; t < steps; ++t, B += N, C += N) {
        vf out[U];
        for (int u = 0; u < U; ++u) out[u] = load(y[t] + u * V);
        for (int j = 0; j < J; ++j)
            for (int u = 0; u < U; ++u) {
                h[j][u] = h[j][u] * load(decays[j][t] + u * V) + load(du[t] + u * V) * B[j];
                out[u] += h[j][u] * C[j];
            }
        for (int u = 0; u < U; ++u) store(y[t] + u * V, out[u]);
    }
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) store(state + j * W + u * V, h[j][u]);
}

struct Adjoint {  // tiles of one chunk and block that the backward states read and fill
    const float (*dt)[W], (*du)[W], (*dy)[W];
    float (*drive)[W], (*rate)[W];  // sums over states: dL/d(dt u), and dL/d(log2 decay) a
};

template <int J>
APART void run_backward(int steps, const Adjoint& m, const Tile* decays, const float* border, float* arriving,
                        const float* a, double* dA, const float* B, const float* C, int64_t N, float* dB, float* dC) {
    alignas(64) float before[T][J][W];
    vf h[J][U], g[J][U], sum[J][U];
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) h[j][u] = load(border + j * W + u * V);
    for (int t = 0; t < steps; ++t)
        for (int j = 0; j < J; ++j) {
            vf fold{};
            for (int u = 0; u < U; ++u) {
                store(before[t][j] + u * V, h[j][u]);
                h[j][u] = h[j][u] * load(decays[j][t] + u * V) + load(m.du[t] + u * V) * B[t * N + j];
                fold += h[j][u] * load(m.dy[t] + u * V);
            }
            float* to = dC + (t * N + j) * V;
            store(to, load(to) + fold);
        }
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) { g[j][u] = load(arriving + j * W + u * V); sum[j][u] = vf{}; }
    for (int t = steps - 1; t >= 0; --t) {
        vf drive[U], rate[U];
        for (int u = 0; u < U; ++u) { drive[u] = load(m.drive[t] + u * V); rate[u] = load(m.rate[t] + u * V); }
        for (int j = 0; j < J; ++j) {
            vf fold{};
            for (int u = 0; u < U; ++u) {
                g[j][u] += load(m.dy[t] + u * V) * C[t * N + j];
                fold += g[j][u] * load(m.du[t] + u * V);
                drive[u] += g[j][u] * B[t * N + j];
                g[j][u] *= load(decays[j][t] + u * V);
                const vf q = g[j][u] * load(before[t][j] + u * V);
                rate[u] += q * load(a + j * W + u * V);
                sum[j][u] += q * load(m.dt[t] + u * V);
            }
            float* to = dB + (t * N + j) * V;
            store(to, load(to) + fold);
        }
        for (int u = 0; u < U; ++u) { store(m.drive[t] + u * V, drive[u]); store(m.rate[t] + u * V, rate[u]); }
    }
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) { store(arriving + j * W + u * V, g[j][u]); add_double(dA + j * W + u * V, sum[j][u]); }
}

// What one task works on: one batch entry, one group, blocks [first, last) of W channels.
struct Task {
    int64_t b, g, first, last, part;
};

inline Task task_at(const ScanShape& s, int64_t index, int64_t splits) {
    const int64_t blocks = (s.width + W - 1) / W, part = index % splits, g = index / splits % s.groups;
    return {index / splits / s.groups, g, blocks * part / splits, blocks * (part + 1) / splits, part};
}

inline int lanes_of(const ScanShape& s, int64_t block) { return int(s.width - block * W < W ? s.width - block * W : W); }

// What stays the same along one direction: scaled A, weight, bias, D and the largest step without care, per block.
struct Fixed {
    float *a, *w, *bias, *skip, *limit;
    static size_t floats(int64_t blocks, int64_t N, int64_t R) { return blocks * W * (N + R + 3); }
    Fixed(Scratch& memory, int64_t blocks, int64_t N, int64_t R)
        : a(memory.take<float>(blocks * N * W)), w(memory.take<float>(blocks * R * W)),
          bias(memory.take<float>(blocks * W)), skip(memory.take<float>(blocks * W)),
          limit(memory.take<float>(blocks * W)) {}
    void fill(const ScanShape& s, int64_t i, int64_t row, int n) {
        const int64_t N = s.states, R = s.rank;
        pack(s.A + row * N, N, n, LOG2E, a + i * N * W);
        if (R) pack(s.weight + row * R, R, n, 1.f, w + i * R * W);
        pack(s.bias ? s.bias + row : nullptr, 1, n, 1.f, bias + i * W);
        pack(s.D ? s.D + row : nullptr, 1, n, 1.f, skip + i * W);
        for (int l = 0; l < W; ++l) {
            float most = 1e-30f;
            for (int64_t j = 0; j < N; ++j) {
                const float x = a[(i * N + j) * W + l], size = x < 0 ? -x : x;
                most = size > most ? size : most;
            }
            limit[i * W + l] = LIMIT / most;
        }
    }
};

// dt (after bias and softplus), du = dt u and `extra`: D u, or the slope of softplus where SLOPE. The raw step is given in
// dt. True when some step is beyond `limit` (or NaN), so that decays need care.
template <bool SOFTPLUS, bool SLOPE, int FETCHES>
APART bool make_dt(const Fixed& f, int64_t i, int steps, const Tile u, Tile dt, Tile du, Tile extra,
                   const Fetch (&fetch)[FETCHES], const Chunk& after) {
    vi wild{};
    for (int t = 0; t < steps; ++t) {
        for (int k = 0; k < FETCHES; ++k) fetch[k].line(after, t);
        for (int l = 0; l < W; l += V) {
            vf d = load(dt[t] + l) + load(f.bias + i * W + l), slope = all(1.f);
            if (SOFTPLUS) d = softplus<SLOPE>(d, &slope);
            const vf x = load(u[t] + l);
            wild |= ~((vf)((vi)d & INT32_MAX) <= load(f.limit + i * W + l));
            store(dt[t] + l, d);
            store(du[t] + l, d * x);
            store(extra[t] + l, SLOPE ? slope : x * load(f.skip + i * W + l));
        }
    }
    int32_t any = 0;
    for (int l = 0; l < V; ++l) any |= wild[l];
    return any != 0;
}

// Step before bias and softplus of block i: read, or weight times its rank form.
inline void delta_tile(const ScanShape& s, const Fixed& f, int64_t i, const float* rows, int64_t offset, int count,
                       const Chunk& c, Tile dt) {
    const int64_t R = s.rank;
    if (!R) return read_tile(s, s.delta, offset, s.dl, s.dc, count, c, dt);
    for (int t = 0; t < c.steps; ++t)
        for (int l = 0; l < W; l += V) {
            vf d{};
            for (int64_t r = 0; r < R; ++r) d += load(f.w + (i * R + r) * W + l) * rows[t * R + r];
            store(dt[t] + l, d);
        }
}

// Calls run(count, first state, decays) for the states of a block, J together or one by one.
template <int J, class Run>
inline void each_states(bool care, int steps, const Tile dt, const float* a, int64_t N, Run run) {
    alignas(64) Tile decays[J];
    for (int64_t j = 0; j < N;) {
        const int count = j + J <= N ? J : 1;
        for (int i = 0; i < count; ++i)
            if (care) run_decays<true>(steps, dt, a + (j + i) * W, decays[i]);
            else run_decays<false>(steps, dt, a + (j + i) * W, decays[i]);
        run(count, j, decays);
        j += count;
    }
}

int forward_task(const ScanShape& s, const Task& job) {
    const int64_t N = s.states, R = s.rank, GD = s.groups * s.width, blocks = job.last - job.first;
    const int64_t chunks = (s.length + T - 1) / T, border = (s.width + W - 1) / W * W * N;
    const int size = s.kind ? 2 : 4;
    Scratch memory((Fixed::floats(blocks, N, R) + blocks * W * N + T * (2 * N + R)) * sizeof(float) + 16 * 64);
    if (!memory.memory) return 1;
    Fixed fixed(memory, blocks, N, R);
    float *state = memory.take<float>(blocks * N * W), *rows = memory.take<float>(T * R);
    float *B = memory.take<float>(T * N), *C = memory.take<float>(T * N);
    Tile u, dt, du, y;
    for (int64_t k = 0; k < s.directions; ++k) {
        const int64_t bk = job.b * s.directions + k, delta = job.b * s.db + k * s.dk;
        const bool add = k != 0 || s.add;
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t row = k * GD + job.g * s.width + (job.first + i) * W, own = row + job.b * s.directions * GD;
            fixed.fill(s, i, row, n);
            pack(s.initial ? s.initial + own * N : nullptr, N, n, 1.f, state + i * N * W);
        }
        Chunk next = chunk_at(s, k, 0);
        for (int64_t q = 0; q < chunks; ++q) {
            const Chunk c = next;
            next = chunk_at(s, k, q + 1);
            read_rows(s, s.B, job.b * s.Bb + k * s.Bk + job.g * s.Bg, s.Bl, s.Bn, N, c, next, B);
            read_rows(s, s.C, job.b * s.Cb + k * s.Ck + job.g * s.Cg, s.Cl, s.Cn, N, c, next, C);
            if (R) read_rows(s, s.delta, delta, s.dl, s.dc, R, c, next, rows);
            for (int64_t i = 0; i < blocks; ++i) {
                const int n = lanes_of(s, job.first + i);
                const int64_t channel = job.g * s.width + (job.first + i) * W;
                const int64_t ahead = i + 1 < blocks ? channel + W : job.g * s.width + job.first * W;
                const Fetch fetch[] = {{s.u, size, job.b * s.ub + ahead * s.uc, s.ul, s.uc},
                                       {s.y, 4, job.b * s.yb + ahead * s.yc, s.yl, s.yc},
                                       {s.delta, size, delta + ahead * s.dc, s.dl, s.dc}};
                float *h = state + i * N * W, *a = fixed.a + i * N * W;
                if (s.borders)
                    std::memcpy(s.borders + ((bk * chunks + q) * s.groups + job.g) * border + (job.first + i) * W * N, h,
                                N * W * sizeof(float));
                read_tile(s, s.u, job.b * s.ub + channel * s.uc, s.ul, s.uc, n, c, u);
                delta_tile(s, fixed, i, rows, delta + channel * s.dc, n, c, dt);
                const Chunk& after = i + 1 < blocks ? c : next;
                const bool care = s.softplus ? make_dt<true, false>(fixed, i, c.steps, u, dt, du, y, fetch, after)
                                             : make_dt<false, false>(fixed, i, c.steps, u, dt, du, y, fetch, after);
                each_states<AHEAD>(care, c.steps, dt, a, N, [&](int count, int64_t j, const Tile* decays) {
                    auto run = count == 1 ? run_forward<1> : run_forward<AHEAD>;
                    run(c.steps, decays, du, y, h + j * W, B + j, C + j, N);
                });
                write_tile(s.y + job.b * s.yb + channel * s.yc, s.yl, s.yc, n, c, add, y);
            }
        }
        for (int64_t i = 0; i < blocks; ++i)
            unpack(state + i * N * W, N, lanes_of(s, job.first + i),
                   s.last + (bk * GD + job.g * s.width + (job.first + i) * W) * N);
    }
    return 0;
}

int backward_task(const ScanShape& s, const Task& job) {
    const int64_t N = s.states, R = s.rank, GD = s.groups * s.width, blocks = job.last - job.first;
    const int64_t chunks = (s.length + T - 1) / T, border = (s.width + W - 1) / W * W * N;
    const int size = s.kind ? 2 : 4;
    Scratch memory((Fixed::floats(blocks, N, R) + blocks * W * N + T * (2 * N + R) * (1 + V)) * sizeof(float) +
                   blocks * W * (N + R + 2) * sizeof(double) + 24 * 64);
    if (!memory.memory) return 1;
    Fixed fixed(memory, blocks, N, R);
    float *arriving = memory.take<float>(blocks * N * W), *rows = memory.take<float>(T * R);
    float *B = memory.take<float>(T * N), *C = memory.take<float>(T * N);
    float *dB = memory.take<float>(T * N * V), *dC = memory.take<float>(T * N * V), *dr = memory.take<float>(T * R * V);
    const int64_t sums = N + R + 2;  // of every block: dA, dweight, dD, dbias
    double* totals = memory.take<double>(blocks * W * sums);
    Tile u, dt, du, dy, slope, drive, rate;
    for (int64_t k = 0; k < s.directions; ++k) {
        const int64_t bk = job.b * s.directions + k, delta = job.b * s.db + k * s.dk, ddelta = job.b * s.fb + k * s.fk;
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t row = k * GD + job.g * s.width + (job.first + i) * W, own = row + job.b * s.directions * GD;
            fixed.fill(s, i, row, n);
            pack(s.dlast ? s.dlast + own * N : nullptr, N, n, 1.f, arriving + i * N * W);
        }
        std::memset(totals, 0, blocks * W * sums * sizeof(double));
        Chunk next = chunk_at(s, k, chunks - 1);
        for (int64_t q = chunks - 1; q >= 0; --q) {
            const Chunk c = next;
            next = chunk_at(s, k, q - 1);
            read_rows(s, s.B, job.b * s.Bb + k * s.Bk + job.g * s.Bg, s.Bl, s.Bn, N, c, next, B);
            read_rows(s, s.C, job.b * s.Cb + k * s.Ck + job.g * s.Cg, s.Cl, s.Cn, N, c, next, C);
            if (R) read_rows(s, s.delta, delta, s.dl, s.dc, R, c, next, rows);
            std::memset(dB, 0, c.steps * N * V * sizeof(float));
            std::memset(dC, 0, c.steps * N * V * sizeof(float));
            if (R) std::memset(dr, 0, c.steps * R * V * sizeof(float));
            for (int64_t i = 0; i < blocks; ++i) {
                const int n = lanes_of(s, job.first + i);
                const int64_t channel = job.g * s.width + (job.first + i) * W;
                const int64_t ahead = i + 1 < blocks ? channel + W : job.g * s.width + job.first * W;
                const Fetch fetch[] = {{s.u, size, job.b * s.ub + ahead * s.uc, s.ul, s.uc},
                                       {s.dy, 4, job.b * s.gb + ahead * s.gc, s.gl, s.gc},
                                       {s.du, 4, job.b * s.yb + ahead * s.yc, s.yl, s.yc},
                                       {s.delta, size, delta + ahead * s.dc, s.dl, s.dc},
                                       {s.ddelta, 4, ddelta + ahead * s.fc, s.fl, s.fc}};
                read_tile(s, s.u, job.b * s.ub + channel * s.uc, s.ul, s.uc, n, c, u);
                read_tile_of(s.dy + job.b * s.gb + channel * s.gc, s.gl, s.gc, n, c, dy);
                delta_tile(s, fixed, i, rows, delta + channel * s.dc, n, c, dt);
                const Chunk& after = i + 1 < blocks ? c : next;
                const bool care = s.softplus ? make_dt<true, true>(fixed, i, c.steps, u, dt, du, slope, fetch, after)
                                             : make_dt<false, true>(fixed, i, c.steps, u, dt, du, slope, fetch, after);
                std::memset(drive, 0, sizeof drive);
                std::memset(rate, 0, sizeof rate);
                const Adjoint m = {dt, du, dy, drive, rate};
                const float* h = s.borders + ((bk * chunks + q) * s.groups + job.g) * border + (job.first + i) * W * N;
                float *g = arriving + i * N * W, *a = fixed.a + i * N * W;
                double* sum = totals + i * W * sums;
                each_states<BACK>(care, c.steps, dt, a, N, [&](int count, int64_t j, const Tile* decays) {
                    auto run = count == 1 ? run_backward<1> : run_backward<BACK>;
                    run(c.steps, m, decays, h + j * W, g + j * W, a + j * W, sum + j * W, B + j, C + j, N, dB + j * V, dC + j * V);
                });
                for (int l = 0; l < W; l += V) {
                    const vf D = load(fixed.skip + i * W + l);
                    vf sumD{}, sumbias{};
                    for (int t = 0; t < c.steps; ++t) {
                        const vf x = load(u[t] + l), y = load(dy[t] + l), f = load(drive[t] + l);
                        const vf raw = (load(rate[t] + l) * LN2 + x * f) * load(slope[t] + l);
                        sumD += y * x;
                        sumbias += raw;
                        store(rate[t] + l, raw);
                        store(drive[t] + l, load(dt[t] + l) * f + D * y);
                    }
                    for (int64_t r = 0; r < R; ++r) {
                        const vf wr = load(fixed.w + (i * R + r) * W + l);
                        vf sumw{};
                        for (int t = 0; t < c.steps; ++t) {
                            float* to = dr + (t * R + r) * V;
                            store(to, load(to) + load(rate[t] + l) * wr);
                            sumw += load(rate[t] + l) * rows[t * R + r];
                        }
                        add_double(sum + (N + r) * W + l, sumw);
                    }
                    add_double(sum + (N + R) * W + l, sumD);
                    add_double(sum + (N + R + 1) * W + l, sumbias);
                }
                write_tile(s.du + job.b * s.yb + channel * s.yc, s.yl, s.yc, n, c, k != 0, drive);
                if (!R) write_tile(s.ddelta + ddelta + channel * s.fc, s.fl, s.fc, n, c, false, rate);
            }
            const int64_t at = job.part * s.part + job.b * s.eb + k * s.ek + job.g * s.eg;
            write_rows(s.dB + at, s.el, s.en, N, c, dB);
            write_rows(s.dC + at, s.el, s.en, N, c, dC);
            if (R) write_rows(s.ddelta + (job.part * s.groups + job.g) * s.batch * s.directions * s.length * R +
                              bk * s.length * R, R, 1, R, c, dr);
        }
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t own = bk * GD + job.g * s.width + (job.first + i) * W;
            const double* sum = totals + i * W * sums;
            unpack(sum, N, n, s.dA + own * N);
            unpack(sum + N * W, R, n, s.dweight + own * R);
            unpack(sum + (N + R) * W, 1, n, s.dD + own);
            unpack(sum + (N + R + 1) * W, 1, n, s.dbias + own);
            unpack(arriving + i * N * W, N, n, s.dinitial + own * N);
        }
    }
    return 0;
}

}  // namespace

extern "C" {

// Tasks [first, last) of batch * groups * splits; 0, or 1 when memory ran out.
int scan_forward(const ScanShape* s, int64_t splits, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
        if (forward_task(*s, task_at(*s, i, splits))) return 1;
    return 0;
}

int scan_backward(const ScanShape* s, int64_t splits, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
        if (backward_task(*s, task_at(*s, i, splits))) return 1;
    return 0;
}

}  // extern "C"
