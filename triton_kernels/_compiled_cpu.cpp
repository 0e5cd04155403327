// The CPU body of the encoder; quantize.py has the formula and the layout, and its reference the same bits.
//
// Compiled once per set of widths, group size and dtype, behind the constants of quantize.py and _hash.py and
//     FORMATS(CASE)         CASE(LOW_BITS, HIGH_BITS) for each width: those of its planes; HIGH_BITS may be 0
//     GROUP_SIZE
//     Word                  the signed integer as wide as an element
//     INFINITY_BITS         infinity as a Word
//     SHIFT, UNIT           a finite element is (its bits << SHIFT, read as float32) * UNIT
//     LARGEST               the dtype's largest number
//
// The loops over the elements of a group stay free of branches and calls, so that the compiler vectorizes them. Minimum
// and maximum are taken on integers in the elements' order: those of floating point vectorize only where nan is ignored.

// Inductor's flags switch this off, because its own code is vectorized by hand.
#pragma GCC optimize("tree-loop-vectorize")
#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")
#endif

#include <cstdint>
#include <cstring>
#include <vector>

constexpr Word MAGNITUDE = static_cast<Word>(~(1u << (8 * sizeof(Word) - 1)));

template <typename To, typename From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// An order of all elements as integers, nan at both ends; its own inverse.
inline Word ordered(Word element) {
    return element ^ (static_cast<Word>(element >> (8 * sizeof(Word) - 1)) & MAGNITUDE);
}

// Infinity and nan come out as any number, in order.
inline float to_float(Word element) {
    if constexpr (UNIT == 1.0f) {
        return bits_of<float>(static_cast<uint32_t>(element) << SHIFT);
    } else {
        const float magnitude = bits_of<float>(static_cast<uint32_t>(element & MAGNITUDE) << SHIFT) * UNIT;
        return bits_of<float>(bits_of<uint32_t>(magnitude) | (static_cast<uint32_t>(element) & 0x80000000u));
    }
}

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

inline float smaller(float x, float y) { return x < y ? x : y; }

// Rounded to bf16: up, unless the highest level would then lie beyond the largest number.
template <int LEVELS>
inline float scale_of(float low, float high) {
    const float room = smaller(LARGEST * 0.5f - low * 0.5f, MAX_SPREAD) / LEVELS * 2.0f;
    const float wanted = smaller((high * 0.5f - low * 0.5f) / LEVELS * 2.0f, room);
    const float raw = smaller(wanted > MIN_SCALE ? wanted : MIN_SCALE, MAX_SCALE);
    const uint32_t bits = bits_of<uint32_t>(raw);
    const float above = bits_of<float>((bits + 0xFFFFu) & 0xFFFF0000u);
    return above <= room ? above : bits_of<float>(bits & 0xFFFF0000u);
}

// `start` is the index of the group's first element, `x` its elements; `codes` holds GROUP_SIZE bytes on the way.
template <int LOW_BITS, int HIGH_BITS>
inline void encode_group(
    const Word* __restrict x, uint64_t start, uint64_t key, uint8_t* __restrict codes, uint8_t* __restrict low_plane,
    uint8_t* __restrict high_plane, uint16_t* scale_out, Word* zero_out) {
    constexpr int LEVELS = (1 << (LOW_BITS + HIGH_BITS)) - 1;
    Word lowest = ordered(x[0]), highest = lowest;
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (int i = 0; i < GROUP_SIZE; ++i) {
        const Word element = ordered(x[i]);
        lowest = element < lowest ? element : lowest;
        highest = element > highest ? element : highest;
    }
    const bool finite = lowest > static_cast<Word>(~INFINITY_BITS) && highest < INFINITY_BITS;
    const float low = to_float(ordered(lowest));
    const float scale = scale_of<LEVELS>(low, to_float(ordered(highest)));
    *scale_out = finite ? bits_of<uint32_t>(scale) >> 16 : 0x7FC0;
    *zero_out = finite ? ordered(lowest) : MAGNITUDE;

    // Positions in units of 2**-FRACTION_BITS, which is exact. At a limit of 0 every code of a group that holds inf or
    // nan is 0.
    const float inverse = 2.0f / scale * (1 << FRACTION_BITS), origin = low * 0.5f;
    const float limit = finite ? static_cast<float>(LEVELS) * (1 << FRACTION_BITS) : 0.0f;
    const uint32_t key0 = static_cast<uint32_t>(key) ^ static_cast<uint32_t>(start >> 32) * INDEX_HIGH_MULTIPLIER;
    const uint32_t key1 = static_cast<uint32_t>(key >> 32), first = static_cast<uint32_t>(start);
#pragma omp simd
    for (int i = 0; i < GROUP_SIZE; ++i) {
        const float position = (to_float(x[i]) * 0.5f - origin) * inverse;
        uint32_t h = ((first + i) ^ key0) * MULTIPLIER0;
        h = (h ^ (h >> SHIFT0) ^ key1) * MULTIPLIER1;
        h = (h ^ (h >> SHIFT1)) >> SHIFT2;
        const int32_t fixed = static_cast<int32_t>(smaller(position, limit));
        codes[i] = static_cast<uint8_t>((fixed + static_cast<int32_t>(h)) >> FRACTION_BITS);
    }
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
