// Normal numbers that follow from a key and a place alone, for experts that were never trained: Philox4x32-10 (Salmon
// et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), each 128 bits of which choose eight of 65,536 quantiles.

#include <cstdint>
#include <cstring>

namespace {

inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t low = uint32_t(a);
        c[0] = uint32_t(b >> 32) ^ c[1] ^ k0, c[1] = uint32_t(b);
        c[2] = uint32_t(a >> 32) ^ c[3] ^ k1, c[3] = low;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

}  // namespace

// out[i] = table[16 bits] for i < size; the counter is (i / 8, 0, expert, layer). One thread: several run at once.
extern "C" void normal_numbers(
    float* out, int64_t size, const float* table, uint64_t seed, uint64_t layer, uint64_t expert
) {
    constexpr int64_t LANES = 16;  // counters at once, which the compiler keeps in vectors
    for (int64_t begin = 0; begin < size; begin += 8 * LANES) {
        uint32_t words[LANES][4];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            uint32_t c[4] = {uint32_t(begin / 8 + lane), 0, uint32_t(expert), uint32_t(layer)};
            philox(c, uint32_t(seed), uint32_t(seed >> 32));
            std::memcpy(words[lane], c, sizeof c);
        }
        uint16_t halves[8 * LANES];
        std::memcpy(halves, words, sizeof words);
        const int64_t length = size - begin < 8 * LANES ? size - begin : 8 * LANES;
        for (int64_t i = 0; i < length; ++i) out[begin + i] = table[halves[i]];
    }
}
