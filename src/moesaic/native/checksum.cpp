// CRC-32, the one of zlib and gzip, at the rate of memory: by carry-less products as Gopal et al. 2009 have it ("Fast CRC
// computation for generic polynomials using PCLMULQDQ", Intel), or by the instruction that ARM has for it.

#include <cstdint>
#include <cstring>

#if defined(__PCLMUL__) && defined(__SSE4_1__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace {

constexpr uint32_t POLYNOMIAL = 0xEDB88320u;  // bit-reversed, as all below

inline uint32_t bytes(uint32_t crc, const uint8_t* data, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
    }
    return crc;
}

#if defined(__PCLMUL__) && defined(__SSE4_1__)

inline __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

// What `state` is so many bits further on, plus `next`; `by` holds x to that power and 64 less, modulo the polynomial.
inline __m128i folded(__m128i state, __m128i by, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(state, by, 0x00), high = _mm_clmulepi64_si128(state, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// At least 64 bytes, a multiple of 16.
uint32_t blocks(uint32_t crc, const uint8_t* data, int64_t size) {
    const __m128i by512 = _mm_set_epi64x(0x1C6E41596, 0x154442BD4), by128 = _mm_set_epi64x(0xCCAA009E, 0x1751997D0);
    __m128i state[4];
    for (int i = 0; i < 4; ++i) state[i] = load(data + 16 * i);
    state[0] = _mm_xor_si128(state[0], _mm_cvtsi32_si128(int(crc)));
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
        for (int i = 0; i < 4; ++i) state[i] = folded(state[i], by512, load(data + 16 * i));
    __m128i x = state[0];
    for (int i = 1; i < 4; ++i) x = folded(x, by128, state[i]);
    for (; size >= 16; data += 16, size -= 16) x = folded(x, by128, load(data));
    // 128 bits to 64, to 32, and by Barrett's reduction to what is left of them.
    const __m128i low32 = _mm_setr_epi32(-1, 0, -1, 0);
    x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by128, 0x10));
    const __m128i by64 = _mm_set_epi64x(0, 0x163CD6124);
    x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low32), by64, 0x00));
    const __m128i barrett = _mm_set_epi64x(0x1F7011641, 0x1DB710641);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low32), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low32), barrett, 0x00);
    return uint32_t(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}
constexpr bool FAST = true;

#elif defined(__ARM_FEATURE_CRC32)

uint32_t blocks(uint32_t crc, const uint8_t* data, int64_t size) {
    for (; size > 0; data += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        crc = __crc32d(crc, word);
    }
    return crc;
}
constexpr bool FAST = true;

#else

uint32_t blocks(uint32_t crc, const uint8_t* data, int64_t size) { return bytes(crc, data, size); }
constexpr bool FAST = false;

#endif

}  // namespace

// Whether this is faster than zlib here.
extern "C" void crc32_is_fast(int64_t* out) { *out = FAST; }

extern "C" void crc32(const uint8_t* data, int64_t size, uint32_t* out) {
    const int64_t whole = size < 64 ? 0 : size / 16 * 16;
    uint32_t crc = ~0u;
    if (whole) crc = blocks(crc, data, whole);
    *out = ~bytes(crc, data + whole, size - whole);
}
