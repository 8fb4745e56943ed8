// Selective scan, forward and backward, for one instruction set: compile with the flags of the set that is wanted
// (none: 4 lanes, -mavx2 -mfma: 8, -mavx512f -mavx512dq: 16). Plain C interface, no dependency.
//
// Lanes are channels: B[t] and C[t] are scalars to all of them, states never meet, so nothing is summed across lanes in
// the forward pass. Time is cut in chunks of 32 steps; u and delta of a chunk are brought into small tiles (time x lanes)
// whatever their strides, then four states at a time run over the tile from registers. Backward keeps only the state
// before every chunk, recomputes decays and states of one chunk, and runs the adjoint backwards. Sums over time
// (dA, dD, dbias, dW) are float32 inside a chunk and float64 across chunks.
//
// A direction is an order in which the positions of one map are visited: forward, reverse, or a table of positions.
// All directions of a map read u in place and add into the same y.

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
constexpr int PAD = 16;   // border states of a group are stored for a multiple of PAD channels on every machine
typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef float Tile[T][V] __attribute__((aligned(64)));

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
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

// 2^x, relative error 4e-9 before rounding, 2^0 == 1 exactly; NaN stays NaN, overflow saturates, underflow is 1e-38.
inline vf exp2v(vf x) {
#if defined(__AVX512F__)
    vf k = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
    x = maxv(all(-126.f), x);
    x = minv(all(127.9999f), x);
    const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
    vf shifted = x + magic;
    vf k = shifted - magic;
#endif
    vf r = x - k;
    vf p = all(0.0001535336189f) * r + 0.001339887442f;
    p = p * r + 0.009618437358f;
    p = p * r + 0.05550332471f;
    p = p * r + 0.2402264791f;
    p = p * r + 0.6931472029f;
    p = p * r + 1.f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|), log(1 + e) = 2 atanh(e / (2 + e)); slope = sigmoid(x).
inline vf softplus(vf x, vf* slope) {
    vf e = exp2v((x < all(0.f) ? x : -x) * LOG2E);
    vf s = e / (e + 2.f), q = s * s;
    vf p = all(0.281783344f) * q + 0.2796060287f;
    p = p * q + 0.4002491027f;
    p = p * q + 0.6666631468f;
    p = p * q + 2.f;
    if (slope) *slope = (x < all(0.f) ? e : all(1.f)) / (e + 1.f);
    return (x < all(0.f) ? all(0.f) : x) + p * s;
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
    int64_t ub, ul, uc;              // u
    int64_t yb, yl, yc;              // y; backward: du
    int64_t gb, gl, gc;              // dy
    int64_t db, dk, dl, dc;          // delta (or its rank form)
    int64_t fb, fk, fl, fc;          // ddelta (not of the rank form: (splits * G, B, K, L, R), contiguous)
    int64_t Bb, Bk, Bg, Bl, Bn;
    int64_t Cb, Ck, Cg, Cl, Cn;
    const int32_t* order;            // (K, L) positions, or null: forward, or reverse where reverse_mask has bit k
    const float *u, *delta, *weight, *A, *B, *C, *D, *bias, *initial;  // weight (K, GD, R), A (K, GD, N), D, bias (K, GD)
    float *y, *last, *borders;       // last (B, K, GD, N); borders (B, K, chunks, G, padded width * N) or null
    const float *dy, *dlast;
    float *du, *ddelta, *dB, *dC, *dinitial;   // dB, dC: (splits, ...) copies `part` elements apart, strides as below
    int64_t eb, ek, eg, el, en, part;          // strides of dB and dC
    double *dA, *dD, *dbias, *dweight;         // (B, K, GD, N), (B, K, GD), (B, K, GD), (B, K, GD, R)
};

int scan_lanes() { return V; }

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
inline void read_tile(const float* base, int64_t stride, int64_t cstride, int count, const Chunk& c, Tile tile) {
    if (cstride == 1 && count == V) {
        for (int t = 0; t < c.steps; ++t) store(tile[t], load(base + c.at[t] * stride));
        return;
    }
    int t = 0;
    if (count == V && c.run && stride == 1)
        for (; t + V <= c.steps; t += V) {
            vf m[V];
            const float* from = base + (c.run > 0 ? c.at[t] : c.at[t + V - 1]);
            for (int i = 0; i < V; ++i) m[i] = load(from + i * cstride);
            transpose(m);
            for (int i = 0; i < V; ++i) store(tile[t + i], m[c.run > 0 ? i : V - 1 - i]);
        }
    for (; t < c.steps; ++t) {
        const float* from = base + c.at[t] * stride;
        for (int i = 0; i < count; ++i) tile[t][i] = from[i * cstride];
        for (int i = count; i < V; ++i) tile[t][i] = 0;
    }
}

inline void write_tile(float* base, int64_t stride, int64_t cstride, int count, const Chunk& c, bool add, Tile tile) {
    if (cstride == 1 && count == V) {
        for (int t = 0; t < c.steps; ++t) {
            float* to = base + c.at[t] * stride;
            vf v = load(tile[t]);
            store(to, add ? v + load(to) : v);
        }
        return;
    }
    int t = 0;
    if (count == V && c.run && stride == 1)
        for (; t + V <= c.steps; t += V) {
            vf m[V];
            float* to = base + (c.run > 0 ? c.at[t] : c.at[t + V - 1]);
            for (int i = 0; i < V; ++i) m[c.run > 0 ? i : V - 1 - i] = load(tile[t + i]);
            transpose(m);
            for (int i = 0; i < V; ++i) store(to + i * cstride, add ? m[i] + load(to + i * cstride) : m[i]);
        }
    for (; t < c.steps; ++t) {
        float* to = base + c.at[t] * stride;
        for (int i = 0; i < count; ++i) to[i * cstride] = tile[t][i] + (add ? to[i * cstride] : 0.f);
    }
}

// Ask for the tile that the next chunk will read (or write) at the same channels; only where a row is one cache line.
template <bool WRITE>
inline void fetch_tile(const float* base, int64_t stride, int64_t cstride, const Chunk& next) {
    if (cstride == 1)
        for (int t = 0; t < next.steps; ++t) __builtin_prefetch(base + next.at[t] * stride, WRITE);
}

// B, C or the rank form of delta of a chunk as (steps, count).
inline void read_rows(const float* base, int64_t stride, int64_t nstride, int64_t count, const Chunk& c, float* rows) {
    if (nstride == 1) {
        for (int t = 0; t < c.steps; ++t) std::memcpy(rows + t * count, base + c.at[t] * stride, count * sizeof(float));
        return;
    }
    for (int64_t n = 0; n < count; ++n)
        for (int t = 0; t < c.steps; ++t) rows[t * count + n] = base[c.at[t] * stride + n * nstride];
}

// Sum the lanes of (steps, count, V) into base + position * stride + n * nstride.
inline void write_rows(float* base, int64_t stride, int64_t nstride, int64_t count, const Chunk& c, const float* lanes) {
    for (int64_t n = 0; n < count; ++n)
        for (int t = 0; t < c.steps; ++t) base[c.at[t] * stride + n * nstride] = total(load(lanes + (t * count + n) * V));
}

// (channels, count) row-major <-> (count, V): `count` numbers of each of the `n` channels that are there.
inline void pack(const float* from, int64_t count, int n, float scale, float* to) {
    for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < V; ++i) to[j * V + i] = i < n && from ? from[i * count + j] * scale : 0.f;
}

template <class X>
inline void unpack(const X* from, int64_t count, int n, X* to) {
    for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < n; ++i) to[i * count + j] = from[j * V + i];
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

// J states over a chunk: h = exp2(dt a) h + du B, y += C h.
template <int J>
inline void run_forward(int steps, const Tile dt, const Tile du, Tile y, float* state, const float* a,
                        const float* B, const float* C, int64_t N) {
    vf h[J], a_[J];
    for (int j = 0; j < J; ++j) { h[j] = load(state + j * V); a_[j] = load(a + j * V); }
    for (int t = 0; t < steps; ++t, B += N, C += N) {
        const vf d = load(dt[t]), x = load(du[t]);
        vf out = load(y[t]);
        for (int j = 0; j < J; ++j) {
            h[j] = h[j] * exp2v(d * a_[j]) + x * B[j];
            out += h[j] * C[j];
        }
        store(y[t], out);
    }
    for (int j = 0; j < J; ++j) store(state + j * V, h[j]);
}

struct Adjoint {  // tiles of one chunk and block that the backward states read and fill
    const float (*dt)[V], (*du)[V], (*dy)[V];
    float (*drive)[V], (*rate)[V];  // sums over states: dL/d(dt u), and dL/d(log2 decay) a
};

template <int J>
inline void run_backward(int steps, const Adjoint& m, const float* border, float* arriving, const float* a, double* dA,
                         const float* B, const float* C, int64_t N, float* dB, float* dC) {
    alignas(64) float before[T][J][V], decay[T][J][V];
    vf h[J], g[J], a_[J], sum[J];
    for (int j = 0; j < J; ++j) { h[j] = load(border + j * V); a_[j] = load(a + j * V); }
    for (int t = 0; t < steps; ++t) {
        const vf d = load(m.dt[t]), x = load(m.du[t]), y = load(m.dy[t]);
        for (int j = 0; j < J; ++j) {
            const vf e = exp2v(d * a_[j]);
            store(before[t][j], h[j]);
            store(decay[t][j], e);
            h[j] = h[j] * e + x * B[t * N + j];
            float* to = dC + (t * N + j) * V;
            store(to, load(to) + h[j] * y);
        }
    }
    for (int j = 0; j < J; ++j) { g[j] = load(arriving + j * V); sum[j] = vf{}; }
    for (int t = steps - 1; t >= 0; --t) {
        const vf d = load(m.dt[t]), x = load(m.du[t]), y = load(m.dy[t]);
        vf drive = load(m.drive[t]), rate = load(m.rate[t]);
        for (int j = 0; j < J; ++j) {
            g[j] += y * C[t * N + j];
            float* to = dB + (t * N + j) * V;
            store(to, load(to) + g[j] * x);
            drive += g[j] * B[t * N + j];
            g[j] *= load(decay[t][j]);
            const vf q = g[j] * load(before[t][j]);
            rate += q * a_[j];
            sum[j] += q * d;
        }
        store(m.drive[t], drive);
        store(m.rate[t], rate);
    }
    for (int j = 0; j < J; ++j) { store(arriving + j * V, g[j]); add_double(dA + j * V, sum[j]); }
}

// What one task works on: one batch entry, one group, blocks [first, last) of V channels.
struct Task {
    int64_t b, g, first, last, part;
};

inline Task task_at(const ScanShape& s, int64_t index, int64_t splits) {
    const int64_t blocks = (s.width + V - 1) / V, part = index % splits, g = index / splits % s.groups;
    return {index / splits / s.groups, g, blocks * part / splits, blocks * (part + 1) / splits, part};
}

inline int lanes_of(const ScanShape& s, int64_t block) { return int(s.width - block * V < V ? s.width - block * V : V); }

// dt (after bias and softplus), du = dt u and, if wanted, the slope of softplus, of one block; `raw` is given in dt.
inline void make_dt(const ScanShape& s, int steps, vf bias, const Tile u, Tile dt, Tile du, float (*slope)[V]) {
    for (int t = 0; t < steps; ++t) {
        vf d = load(dt[t]) + bias, k = all(1.f);
        if (s.softplus) d = softplus(d, slope ? &k : nullptr);
        if (slope) store(slope[t], k);
        store(dt[t], d);
        store(du[t], d * load(u[t]));
    }
}

inline void delta_tile(const ScanShape& s, int64_t R, const float* rows, const float* w, const float* base, int count,
                       const Chunk& c, Tile dt) {
    if (!R) return read_tile(base, s.dl, s.dc, count, c, dt);
    for (int t = 0; t < c.steps; ++t) {
        vf d{};
        for (int64_t r = 0; r < R; ++r) d += load(w + r * V) * rows[t * R + r];
        store(dt[t], d);
    }
}

inline vf channel_row(const float* row, int64_t channel, int count) {
    vf v{};
    if (row) for (int i = 0; i < count; ++i) v[i] = row[channel + i];
    return v;
}

int forward_task(const ScanShape& s, const Task& job) {
    const int64_t N = s.states, R = s.rank, GD = s.groups * s.width, blocks = job.last - job.first;
    const int64_t chunks = (s.length + T - 1) / T, border = (s.width + PAD - 1) / PAD * PAD * N;
    Scratch memory((blocks * V * (2 * N + R + 2) + T * (2 * N + R)) * sizeof(float) + 8 * 64);
    if (!memory.memory) return 1;
    float *state = memory.take<float>(blocks * N * V), *a = memory.take<float>(blocks * N * V);
    float *w = memory.take<float>(blocks * R * V), *rows = memory.take<float>(T * R);
    float *bias = memory.take<float>(blocks * V), *skip = memory.take<float>(blocks * V);
    float *B = memory.take<float>(T * N), *C = memory.take<float>(T * N);
    Tile u, dt, du, y;
    for (int64_t k = 0; k < s.directions; ++k) {
        const int64_t bk = job.b * s.directions + k;
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t row = k * GD + job.g * s.width + (job.first + i) * V, own = row + job.b * s.directions * GD;
            pack(s.A + row * N, N, n, LOG2E, a + i * N * V);
            pack(s.initial ? s.initial + own * N : nullptr, N, n, 1.f, state + i * N * V);
            if (R) pack(s.weight + row * R, R, n, 1.f, w + i * R * V);
            store(bias + i * V, channel_row(s.bias, row, n));
            store(skip + i * V, channel_row(s.D, row, n));
        }
        for (int64_t q = 0; q < chunks; ++q) {
            const Chunk c = chunk_at(s, k, q), next = chunk_at(s, k, q + 1);
            read_rows(s.B + job.b * s.Bb + k * s.Bk + job.g * s.Bg, s.Bl, s.Bn, N, c, B);
            read_rows(s.C + job.b * s.Cb + k * s.Ck + job.g * s.Cg, s.Cl, s.Cn, N, c, C);
            const float* delta = s.delta + job.b * s.db + k * s.dk;
            if (R) read_rows(delta, s.dl, s.dc, R, c, rows);
            for (int64_t i = 0; i < blocks; ++i) {
                const int n = lanes_of(s, job.first + i);
                const int64_t channel = job.g * s.width + (job.first + i) * V;
                float *h = state + i * N * V, *ai = a + i * N * V;
                if (s.borders)
                    std::memcpy(s.borders + ((bk * chunks + q) * s.groups + job.g) * border + (job.first + i) * V * N, h,
                                N * V * sizeof(float));
                fetch_tile<false>(s.u + job.b * s.ub + channel * s.uc, s.ul, s.uc, next);
                fetch_tile<true>(s.y + job.b * s.yb + channel * s.yc, s.yl, s.yc, next);
                if (!R) fetch_tile<false>(delta + channel * s.dc, s.dl, s.dc, next);
                read_tile(s.u + job.b * s.ub + channel * s.uc, s.ul, s.uc, n, c, u);
                delta_tile(s, R, rows, w + i * R * V, delta + channel * s.dc, n, c, dt);
                make_dt(s, c.steps, load(bias + i * V), u, dt, du, nullptr);
                const vf D = load(skip + i * V);
                for (int t = 0; t < c.steps; ++t) store(y[t], load(u[t]) * D);
                int64_t j = 0;
                for (; j + 4 <= N; j += 4) run_forward<4>(c.steps, dt, du, y, h + j * V, ai + j * V, B + j, C + j, N);
                if (N - j >= 2) { run_forward<2>(c.steps, dt, du, y, h + j * V, ai + j * V, B + j, C + j, N); j += 2; }
                if (N - j) run_forward<1>(c.steps, dt, du, y, h + j * V, ai + j * V, B + j, C + j, N);
                write_tile(s.y + job.b * s.yb + channel * s.yc, s.yl, s.yc, n, c, k != 0, y);
            }
        }
        for (int64_t i = 0; i < blocks; ++i)
            unpack(state + i * N * V, N, lanes_of(s, job.first + i),
                   s.last + (bk * GD + job.g * s.width + (job.first + i) * V) * N);
    }
    return 0;
}

int backward_task(const ScanShape& s, const Task& job) {
    const int64_t N = s.states, R = s.rank, GD = s.groups * s.width, blocks = job.last - job.first;
    const int64_t chunks = (s.length + T - 1) / T, border = (s.width + PAD - 1) / PAD * PAD * N;
    Scratch memory((blocks * V * (2 * N + R + 2) + T * (2 * N + R) + T * V * (2 * N + R)) * sizeof(float) +
                   blocks * V * (N + R + 2) * sizeof(double) + 16 * 64);
    if (!memory.memory) return 1;
    float *arriving = memory.take<float>(blocks * N * V), *a = memory.take<float>(blocks * N * V);
    float *w = memory.take<float>(blocks * R * V), *rows = memory.take<float>(T * R);
    float *bias = memory.take<float>(blocks * V), *skip = memory.take<float>(blocks * V);
    float *B = memory.take<float>(T * N), *C = memory.take<float>(T * N);
    float *dB = memory.take<float>(T * N * V), *dC = memory.take<float>(T * N * V), *dr = memory.take<float>(T * R * V);
    double *dA = memory.take<double>(blocks * N * V), *dw = memory.take<double>(blocks * R * V);
    double *dD = memory.take<double>(blocks * V), *dbias = memory.take<double>(blocks * V);
    Tile u, dt, du, dy, slope, drive, rate;
    for (int64_t k = 0; k < s.directions; ++k) {
        const int64_t bk = job.b * s.directions + k;
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t row = k * GD + job.g * s.width + (job.first + i) * V, own = row + job.b * s.directions * GD;
            pack(s.A + row * N, N, n, LOG2E, a + i * N * V);
            pack(s.dlast ? s.dlast + own * N : nullptr, N, n, 1.f, arriving + i * N * V);
            if (R) pack(s.weight + row * R, R, n, 1.f, w + i * R * V);
            store(bias + i * V, channel_row(s.bias, row, n));
            store(skip + i * V, channel_row(s.D, row, n));
        }
        std::memset(dA, 0, blocks * N * V * sizeof(double));
        std::memset(dw, 0, blocks * R * V * sizeof(double));
        std::memset(dD, 0, blocks * V * sizeof(double));
        std::memset(dbias, 0, blocks * V * sizeof(double));
        for (int64_t q = chunks - 1; q >= 0; --q) {
            const Chunk c = chunk_at(s, k, q), next = chunk_at(s, k, q - 1);
            read_rows(s.B + job.b * s.Bb + k * s.Bk + job.g * s.Bg, s.Bl, s.Bn, N, c, B);
            read_rows(s.C + job.b * s.Cb + k * s.Ck + job.g * s.Cg, s.Cl, s.Cn, N, c, C);
            const float* delta = s.delta + job.b * s.db + k * s.dk;
            if (R) read_rows(delta, s.dl, s.dc, R, c, rows);
            std::memset(dB, 0, c.steps * N * V * sizeof(float));
            std::memset(dC, 0, c.steps * N * V * sizeof(float));
            if (R) std::memset(dr, 0, c.steps * R * V * sizeof(float));
            for (int64_t i = 0; i < blocks; ++i) {
                const int n = lanes_of(s, job.first + i);
                const int64_t channel = job.g * s.width + (job.first + i) * V;
                fetch_tile<false>(s.u + job.b * s.ub + channel * s.uc, s.ul, s.uc, next);
                fetch_tile<false>(s.dy + job.b * s.gb + channel * s.gc, s.gl, s.gc, next);
                fetch_tile<true>(s.du + job.b * s.yb + channel * s.yc, s.yl, s.yc, next);
                if (!R) fetch_tile<false>(delta + channel * s.dc, s.dl, s.dc, next);
                if (!R) fetch_tile<true>(s.ddelta + job.b * s.fb + k * s.fk + channel * s.fc, s.fl, s.fc, next);
                read_tile(s.u + job.b * s.ub + channel * s.uc, s.ul, s.uc, n, c, u);
                read_tile(s.dy + job.b * s.gb + channel * s.gc, s.gl, s.gc, n, c, dy);
                delta_tile(s, R, rows, w + i * R * V, delta + channel * s.dc, n, c, dt);
                make_dt(s, c.steps, load(bias + i * V), u, dt, du, slope);
                std::memset(drive, 0, sizeof drive);
                std::memset(rate, 0, sizeof rate);
                const Adjoint m = {dt, du, dy, drive, rate};
                const float* h = s.borders + ((bk * chunks + q) * s.groups + job.g) * border + (job.first + i) * V * N;
                float *g = arriving + i * N * V, *ai = a + i * N * V;
                double* dAi = dA + i * N * V;
                int64_t j = 0;
                for (; j + 4 <= N; j += 4)
                    run_backward<4>(c.steps, m, h + j * V, g + j * V, ai + j * V, dAi + j * V, B + j, C + j, N, dB + j * V, dC + j * V);
                if (N - j >= 2) {
                    run_backward<2>(c.steps, m, h + j * V, g + j * V, ai + j * V, dAi + j * V, B + j, C + j, N, dB + j * V, dC + j * V);
                    j += 2;
                }
                if (N - j)
                    run_backward<1>(c.steps, m, h + j * V, g + j * V, ai + j * V, dAi + j * V, B + j, C + j, N, dB + j * V, dC + j * V);
                const vf D = load(skip + i * V);
                vf sumD{}, sumbias{};
                for (int t = 0; t < c.steps; ++t) {
                    const vf x = load(u[t]), y = load(dy[t]), f = load(drive[t]);
                    const vf raw = (load(rate[t]) * LN2 + x * f) * load(slope[t]);
                    sumD += y * x;
                    sumbias += raw;
                    store(rate[t], raw);
                    store(drive[t], load(dt[t]) * f + D * y);
                }
                add_double(dD + i * V, sumD);
                add_double(dbias + i * V, sumbias);
                write_tile(s.du + job.b * s.yb + channel * s.yc, s.yl, s.yc, n, c, k != 0, drive);
                if (!R) write_tile(s.ddelta + job.b * s.fb + k * s.fk + channel * s.fc, s.fl, s.fc, n, c, false, rate);
                for (int64_t r = 0; r < R; ++r) {
                    const vf wr = load(w + (i * R + r) * V);
                    vf sum{};
                    for (int t = 0; t < c.steps; ++t) {
                        float* to = dr + (t * R + r) * V;
                        store(to, load(to) + load(rate[t]) * wr);
                        sum += load(rate[t]) * rows[t * R + r];
                    }
                    add_double(dw + (i * R + r) * V, sum);
                }
            }
            const int64_t at = job.part * s.part + job.b * s.eb + k * s.ek + job.g * s.eg;
            write_rows(s.dB + at, s.el, s.en, N, c, dB);
            write_rows(s.dC + at, s.el, s.en, N, c, dC);
            if (R) write_rows(s.ddelta + (job.part * s.groups + job.g) * s.batch * s.directions * s.length * R +
                              bk * s.length * R, R, 1, R, c, dr);
        }
        for (int64_t i = 0; i < blocks; ++i) {
            const int n = lanes_of(s, job.first + i);
            const int64_t own = bk * GD + job.g * s.width + (job.first + i) * V;
            unpack(dA + i * N * V, N, n, s.dA + own * N);
            unpack(dw + i * R * V, R, n, s.dweight + own * R);
            unpack(dD + i * V, 1, n, s.dD + own);
            unpack(dbias + i * V, 1, n, s.dbias + own);
            unpack(arriving + i * N * V, N, n, s.dinitial + own * N);
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
