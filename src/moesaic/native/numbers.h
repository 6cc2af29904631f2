// What the kernels share: numbers as they are stored, and each thread's part of the work.

#pragma once

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

inline float number(float value) { return value; }
inline float number(int8_t value) { return value; }
inline float number(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline void store(float& to, float value) { to = value; }
inline void store(bf16& to, float value) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// Sixteen numbers at once: one register of AVX-512, two of AVX2, four of NEON.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

inline Lanes load(const float* from) {
    Lanes result;
    std::memcpy(&result, from, sizeof result);
    return result;
}
inline Lanes load(const bf16* from) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Words __attribute__((vector_size(64)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}
inline Lanes load(const int8_t* from) {
    // What gcc 12 makes of the last form, and of a plain loop, reads 5 and 23 GB/s where these read 29.
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    __m256 halves[2];
    for (int h = 0; h < 2; ++h)
        halves[h] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * h))));
    return load((const float*)halves);
#else
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Lanes);
#endif
}
inline float sum(Lanes lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];
    std::memcpy(eight, &lanes, sizeof eight);
    eight[0] += eight[1];
    Four four[2];
    std::memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

// Work of a few microseconds stays on one thread; a call with a parallel region takes 1.7 of them by itself.
inline bool worth_threads(int64_t multiply_adds) { return multiply_adds >= 1 << 15; }

// The part of `tasks` that is this thread's.
struct Share {
    int64_t begin, end;
    explicit Share(int64_t tasks) {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        begin = tasks * thread / threads;
        end = tasks * (thread + 1) / threads;
    }
};
