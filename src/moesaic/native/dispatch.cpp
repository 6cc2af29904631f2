// Choices sorted by expert, by counting. N = T·K choices; expert[c] is the expert of choice c, kept[c] whether it
// is carried out.

#include <algorithm>
#include <cstdint>

// counts[e] = the kept choices of expert e.
extern "C" void count_choices(const int64_t* expert, const bool* kept, int64_t N, int64_t E, int64_t* counts) {
    std::fill_n(counts, E, 0);
    for (int64_t c = 0; c < N; ++c) counts[expert[c]] += kept[c];
}

// The rows of expert e begin at next[e], in the order of choices: order[r] is the choice of row r, token[r] its
// token, place[c] the row of choice c. A row of nobody has order N and the last token, a choice that is not kept
// the place R. `next` is moved.
extern "C" void place_choices(const int64_t* expert, const bool* kept, int64_t N, int64_t K, int64_t R,
                              int64_t* next, int64_t* order, int64_t* token, int64_t* place) {
    std::fill_n(order, R, N);
    std::fill_n(token, R, N / K - 1);
    for (int64_t c = 0; c < N; ++c) {
        if (!kept[c]) {
            place[c] = R;
            continue;
        }
        const int64_t r = next[expert[c]]++;
        order[r] = c, token[r] = c / K, place[c] = r;
    }
}
