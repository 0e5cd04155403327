// What the CPU bodies of the formats share: elements as integers and floats, a group's scale, an element's code.
//
// Their sources go behind this one and the constants of quantize.py and _hash.py, and
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

// A number that is neither infinite nor nan, rounded to the nearest element, ties to even.
inline Word from_float(float value) {
    const uint32_t bits = bits_of<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
    if constexpr (SHIFT == 0) {
        return static_cast<Word>(bits);
    } else if constexpr (SHIFT == 16) {
        const uint32_t rounded = (magnitude + 0x7FFFu + ((magnitude >> 16) & 1)) >> 16;
        return static_cast<Word>(rounded | ((bits >> 16) & 0x8000u));
    } else {
        // Below 2**-14 a sum with 0.5 rounds to multiples of 2**-24.
        const uint32_t tiny = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3F000000u;
        const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t rounded = magnitude < (113u << 23) ? tiny : normal < 0x7C00u ? normal : 0x7C00u;
        return static_cast<Word>(rounded | ((bits >> 16) & 0x8000u));
    }
}

// An element in the 16 bits it is stored in.
inline uint16_t to_16_bits(Word element) {
    if constexpr (sizeof(Word) == 2) {
        return static_cast<uint16_t>(element);
    } else {
        const uint32_t bits = static_cast<uint32_t>(element), magnitude = bits & 0x7FFFFFFFu;
        const uint32_t rounded = (magnitude + 0x7FFFu + ((magnitude >> 16) & 1)) >> 16;
        const uint32_t limited = rounded < 0x7F80u ? rounded : 0x7F7Fu;
        const uint32_t special = magnitude == 0x7F800000u ? 0x7F80u : 0x7FC0u;
        return static_cast<uint16_t>((magnitude < 0x7F800000u ? limited : special) | ((bits >> 16) & 0x8000u));
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

// A group's lowest and highest element, in order.
struct Range {
    Word lowest, highest;
    bool finite() const { return lowest > static_cast<Word>(~INFINITY_BITS) && highest < INFINITY_BITS; }
};

inline Range range_of(const Word* x, int n) {
    Word lowest = ordered(x[0]), highest = lowest;
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (int i = 0; i < n; ++i) {
        const Word element = ordered(x[i]);
        lowest = element < lowest ? element : lowest;
        highest = element > highest ? element : highest;
    }
    return {lowest, highest};
}

// Gives the codes of a group whose first element has the index `start`.
template <int LEVELS>
struct Encoder {
    float scale, inverse, origin, limit;
    uint32_t key0, key1, first;

    Encoder(Range range, uint64_t start, uint64_t key) {
        const float low = to_float(ordered(range.lowest));
        scale = scale_of<LEVELS>(low, to_float(ordered(range.highest)));
        // Positions in units of 2**-FRACTION_BITS, which is exact. At a limit of 0 every code of a group that holds inf
        // or nan is 0.
        inverse = 2.0f / scale * (1 << FRACTION_BITS);
        origin = low * 0.5f;
        limit = range.finite() ? static_cast<float>(LEVELS) * (1 << FRACTION_BITS) : 0.0f;
        key0 = static_cast<uint32_t>(key) ^ static_cast<uint32_t>(start >> 32) * INDEX_HIGH_MULTIPLIER;
        key1 = static_cast<uint32_t>(key >> 32);
        first = static_cast<uint32_t>(start);
    }

    uint8_t code(Word element, uint32_t place) const {
        const float position = (to_float(element) * 0.5f - origin) * inverse;
        uint32_t h = ((first + place) ^ key0) * MULTIPLIER0;
        h = (h ^ (h >> SHIFT0) ^ key1) * MULTIPLIER1;
        h = (h ^ (h >> SHIFT1)) >> SHIFT2;
        const int32_t fixed = static_cast<int32_t>(smaller(position, limit));
        return static_cast<uint8_t>((fixed + static_cast<int32_t>(h)) >> FRACTION_BITS);
    }

    void store_steps(Range range, uint16_t* scale_out, Word* zero_out) const {
        *scale_out = range.finite() ? bits_of<uint32_t>(scale) >> 16 : 0x7FC0;
        *zero_out = range.finite() ? ordered(range.lowest) : MAGNITUDE;
    }
};
