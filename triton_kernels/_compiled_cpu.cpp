// The CPU body of the encoder; quantize.py has the formula and the layout, and its reference the same bits.
//
// Compiled once per set of widths, group size and dtype, behind _compiled_elements.cpp and
//     FORMATS(CASE)         CASE(LOW_BITS, HIGH_BITS) for each width: those of its planes; HIGH_BITS may be 0
//     GROUP_SIZE

// One plane of a group: bits OFFSET .. OFFSET + WIDTH of its codes.
template <int OFFSET, int WIDTH>
inline void pack(const uint8_t* codes, uint8_t* plane) {
    constexpr int NBYTES = GROUP_SIZE * WIDTH / 8;
#pragma omp simd
    for (int j = 0; j < NBYTES; ++j) {
        unsigned byte = 0;
        for (int i = 0; i < 8 / WIDTH; ++i) {
            byte |= ((codes[j + i * NBYTES] >> OFFSET) & ((1u << WIDTH) - 1)) << (WIDTH * i);
        }
        plane[j] = static_cast<uint8_t>(byte);
    }
}

// `start` is the index of the group's first element, `x` its elements; `codes` holds GROUP_SIZE bytes on the way.
template <int LOW_BITS, int HIGH_BITS>
inline void encode_group(
    const Word* __restrict x, uint64_t start, uint64_t key, uint8_t* __restrict codes, uint8_t* __restrict low_plane,
    uint8_t* __restrict high_plane, uint16_t* scale_out, Word* zero_out) {
    const auto place = [](int i) { return i; };
    encode_values<(1 << (LOW_BITS + HIGH_BITS)) - 1>(x, GROUP_SIZE, start, key, place, codes, scale_out, zero_out);
    pack<0, LOW_BITS>(codes, low_plane);
    if constexpr (HIGH_BITS > 0) {
        pack<LOW_BITS, HIGH_BITS>(codes, high_plane);
    }
}

template <int LOW_BITS, int HIGH_BITS>
inline void encode(
    const Word* x,        // [numel], 1 or more
    const int64_t* seed,  // []
    uint8_t* codes,       // [groups * GROUP_SIZE * (LOW_BITS + HIGH_BITS) / 8]
    uint16_t* scale,      // [groups], the bits of bf16
    Word* zero,           // [groups]
    int64_t salt_key, int64_t numel, int64_t threads) {
    const int64_t groups = (numel + GROUP_SIZE - 1) / GROUP_SIZE, key = *seed ^ salt_key;
    constexpr int LOW_NBYTES = GROUP_SIZE * LOW_BITS / 8, HIGH_NBYTES = GROUP_SIZE * HIGH_BITS / 8;
    uint8_t* high_codes = codes + groups * LOW_NBYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> on_the_way(GROUP_SIZE);
        std::vector<Word> filled(GROUP_SIZE);
#pragma omp for
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t start = g * GROUP_SIZE, rest = numel - start;
            const Word* elements = x + start;
            if (rest < GROUP_SIZE) {
                for (int i = 0; i < GROUP_SIZE; ++i) {
                    filled[i] = elements[i < rest ? i : rest - 1];
                }
                elements = filled.data();
            }
            encode_group<LOW_BITS, HIGH_BITS>(
                elements, start, key, on_the_way.data(), codes + g * LOW_NBYTES, high_codes + g * HIGH_NBYTES,
                scale + g, zero + g);
        }
    }
}

extern "C" void kernel(
    const Word* x, const int64_t* seed, uint8_t* codes, uint16_t* scale, Word* zero, int64_t salt_key, int64_t numel,
    int64_t threads, int64_t bits) {
    switch (bits) {
#define CASE(LOW_BITS, HIGH_BITS) \
    case LOW_BITS + HIGH_BITS: \
        return encode<LOW_BITS, HIGH_BITS>(x, seed, codes, scale, zero, salt_key, numel, threads);
        FORMATS(CASE)
    }
}
