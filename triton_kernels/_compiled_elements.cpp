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

// Of `levels` levels, rounded to bf16: up, unless the highest level would then lie beyond the largest number.
inline float scale_of(float low, float high, float levels) {
    const float room = smaller(LARGEST * 0.5f - low * 0.5f, MAX_SPREAD) / levels * 2.0f;
    const float wanted = smaller((high * 0.5f - low * 0.5f) / levels * 2.0f, room);
    const float raw = smaller(wanted > MIN_SCALE ? wanted : MIN_SCALE, MAX_SCALE);
    const uint32_t bits = bits_of<uint32_t>(raw);
    const float above = bits_of<float>((bits + 0xFFFFu) & 0xFFFF0000u);
    return above <= room ? above : bits_of<float>(bits & 0xFFFF0000u);
}

inline bool is_finite(Word element) { return (element & MAGNITUDE) < INFINITY_BITS; }

// A group's lowest and highest element, in order.
struct Range {
    Word lowest, highest;
    bool is_whole() const { return lowest > static_cast<Word>(~INFINITY_BITS) && highest < INFINITY_BITS; }
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

// The same of the finite elements; 0 where there are none.
inline Range known_range_of(const Word* x, int n) {
    Word lowest = INFINITY_BITS, highest = static_cast<Word>(~INFINITY_BITS);
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (int i = 0; i < n; ++i) {
        const Word element = ordered(x[i]);
        const Word low = is_finite(x[i]) ? element : INFINITY_BITS;
        const Word high = is_finite(x[i]) ? element : static_cast<Word>(~INFINITY_BITS);
        lowest = low < lowest ? low : lowest;
        highest = high > highest ? high : highest;
    }
    return lowest <= highest ? Range{lowest, highest} : Range{0, 0};
}

// Gives the codes of a group whose first element has the index `start`. One that is not whole has those of the negated
// elements, with one level less.
template <int LEVELS>
struct Encoder {
    float scale, inverse, zero, origin, limit;
    uint32_t key0, key1, first;

    Encoder(Range range, bool is_whole, uint64_t start, uint64_t key) {
        const float lowest = to_float(ordered(range.lowest)), highest = to_float(ordered(range.highest));
        const float low = is_whole ? lowest : -highest, high = is_whole ? highest : -lowest;
        const float sign = is_whole ? 1.0f : -1.0f, top = is_whole || LEVELS == 1 ? LEVELS : LEVELS - 1;
        scale = scale_of(low, high, top);
        // Positions in units of 2**-FRACTION_BITS, which is exact.
        inverse = 2.0f / scale * (1 << FRACTION_BITS) * sign;
        scale *= sign;
        zero = low * sign;
        origin = zero * 0.5f;
        limit = top * (1 << FRACTION_BITS);
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

    // Takes the codes of a group that is not whole to what is stored: the highest for inf and nan.
    void mark(const Word* x, int n, uint8_t* codes) {
        if constexpr (LEVELS == 1) {
            int ones = 0, known = 0;
            for (int i = 0; i < n; ++i) {
                known += is_finite(x[i]);
                ones += is_finite(x[i]) ? codes[i] : 0;
                codes[i] = 0;
            }
            const float share = static_cast<float>(ones) / static_cast<float>(known > 1 ? known : 1);
            // 16 significant bits: the product is exact.
            zero += scale * bits_of<float>(bits_of<uint32_t>(share) & 0xFFFFFF00u);
        }
        for (int i = 0; i < n; ++i) {
            codes[i] = is_finite(x[i]) ? codes[i] : LEVELS;
        }
    }
};

// Codes, scale and zero of a group of `n` elements, whose places in the tensor follow `start`.
template <int LEVELS, typename Place>
inline void encode_values(
    const Word* __restrict x, int n, uint64_t start, uint64_t key, Place place, uint8_t* __restrict codes,
    uint16_t* scale_out, Word* zero_out) {
    const Range range = range_of(x, n);
    const bool is_whole = range.is_whole();
    Encoder<LEVELS> encoder(is_whole ? range : known_range_of(x, n), is_whole, start, key);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        codes[i] = encoder.code(x[i], place(i));
    }
    if (!is_whole) {
        encoder.mark(x, n, codes);
    }
    *scale_out = static_cast<uint16_t>(bits_of<uint32_t>(encoder.scale) >> 16);
    *zero_out = from_float(encoder.zero);
}
