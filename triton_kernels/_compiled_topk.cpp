// The CPU bodies of pruning and its inverse; topk.py has the formula and the layout, and its reference the same bits.
//
// Compiled once per block and dtype, behind _compiled_elements.cpp and
//     BLOCK, GROUP          elements of a block and of a group
//     POSITION_BITS         bits of a position, 0 where a block has a bitmap

constexpr int BLOCKS = GROUP / BLOCK, KEY_BITS = 8 * sizeof(Word) - 1;

// `values` of a group on the way, their places in it, and scratch.
struct Group {
    alignas(64) Word elements[GROUP], keys[GROUP], kept[GROUP];
    alignas(64) uint16_t places[GROUP];
    alignas(64) uint8_t flags[GROUP], codes[GROUP + 1];
};

// Eight flags to the bits of a byte, and back.
inline uint8_t pack_flags(const uint8_t* flags) {
    uint64_t eight;
    std::memcpy(&eight, flags, 8);
    return static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
}

// How many keys reach a threshold.
inline int count_reaching(const Word* keys, Word threshold) {
    Word count = 0;
#pragma omp simd reduction(+ : count)
    for (int i = 0; i < BLOCK; ++i) {
        count += keys[i] >= threshold ? 1 : 0;
    }
    return count;
}

// The bitmap of a block's largest elements, and their places.
inline void select_bits(Group& group, int keep, uint8_t* bitmap) {
    Word threshold = 0;
    int reaching = BLOCK;
    // Once as many as are kept reach it, lower bits decide nothing.
    for (int bit = KEY_BITS - 1; bit >= 0 && reaching != keep; --bit) {
        const Word raised = static_cast<Word>(threshold | (Word(1) << bit));
        const int count = count_reaching(group.keys, raised);
        threshold = count >= keep ? raised : threshold;
        reaching = count >= keep ? count : reaching;
    }
#pragma omp simd
    for (int i = 0; i < BLOCK; ++i) {
        group.flags[i] = group.keys[i] >= threshold ? 1 : 0;
    }
    // The last of equal magnitudes give way.
    for (int i = BLOCK - 1; reaching > keep; --i) {
        const bool leaves = group.keys[i] == threshold;
        group.flags[i] = leaves ? 0 : group.flags[i];
        reaching -= leaves;
    }
    uint16_t* place = group.places;
    for (int i = 0; i < BLOCK / 8; ++i) {
        bitmap[i] = pack_flags(group.flags + 8 * i);
    }
    for (int i = 0; i < BLOCK / 64; ++i) {
        uint64_t word;
        std::memcpy(&word, bitmap + 8 * i, 8);
        for (; word; word &= word - 1) {
            *place++ = static_cast<uint16_t>(64 * i + __builtin_ctzll(word));
        }
    }
}

// Inserts an element of block `b` among its largest so far, from the J-th on: behind a smaller one all others move on, in
// their order. A recursion with masks: the compiler vectorizes around neither a loop of three steps nor a branch.
template <int KEEP, int J = 0>
inline void insert(
    Word (&keys)[KEEP][BLOCKS], Word (&places)[KEEP][BLOCKS], int b, Word key, Word place, Word moves = 0) {
    const Word old_key = keys[J][b], old_place = places[J][b];
    moves |= key > old_key ? -1 : 0;
    const Word key_change = (key ^ old_key) & moves, place_change = (place ^ old_place) & moves;
    keys[J][b] = old_key ^ key_change;
    places[J][b] = old_place ^ place_change;
    if constexpr (J + 1 < KEEP) {
        insert<KEEP, J + 1>(keys, places, b, key ^ key_change, place ^ place_change, moves);
    }
}

// The places of the KEEP largest elements of each block, block by block, all blocks side by side.
template <int KEEP>
inline void select_places(Group& group) {
    Word lanes[BLOCK][BLOCKS], largest[KEEP][BLOCKS], place[KEEP][BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
        for (int i = 0; i < BLOCK; ++i) {
            lanes[i][b] = group.keys[b * BLOCK + i];
        }
    }
    std::memset(largest, -1, sizeof(largest));
    for (int i = 0; i < BLOCK; ++i) {
#pragma omp simd
        for (int b = 0; b < BLOCKS; ++b) {
            insert<KEEP>(largest, place, b, lanes[i][b], static_cast<Word>(i));
        }
    }
    // In ascending order.
    for (int last = KEEP - 1; last > 0; --last) {
        for (int j = 0; j < last; ++j) {
#pragma omp simd
            for (int b = 0; b < BLOCKS; ++b) {
                const Word x = place[j][b], y = place[j + 1][b];
                place[j][b] = x < y ? x : y;
                place[j + 1][b] = x < y ? y : x;
            }
        }
    }
    for (int b = 0; b < BLOCKS; ++b) {
        for (int j = 0; j < KEEP; ++j) {
            group.places[b * KEEP + j] = static_cast<uint16_t>(b * BLOCK + place[j][b]);
        }
    }
}

// Fields of a group, WIDTH bits each; what the last byte has room for is 0.
template <int WIDTH, typename Field>
inline void pack_fields(const Field* fields, int num, uint8_t* packed) {
    constexpr int PER_BYTE = 8 / WIDTH;
    for (int j = 0; j < num / PER_BYTE; ++j) {
        unsigned byte = 0;
        for (int i = 0; i < PER_BYTE; ++i) {
            byte |= (fields[j * PER_BYTE + i] & ((1u << WIDTH) - 1)) << (WIDTH * i);
        }
        packed[j] = static_cast<uint8_t>(byte);
    }
    if (num % PER_BYTE) {
        packed[num / PER_BYTE] = static_cast<uint8_t>(fields[num - 1] & ((1u << WIDTH) - 1));
    }
}

// The inverse, for all fields that the bytes have room for.
template <int WIDTH>
inline void unpack_fields(const uint8_t* packed, int num, uint8_t* fields) {
    constexpr int PER_BYTE = 8 / WIDTH;
#pragma omp simd
    for (int j = 0; j < (num + PER_BYTE - 1) / PER_BYTE; ++j) {
        for (int i = 0; i < PER_BYTE; ++i) {
            fields[j * PER_BYTE + i] = (packed[j] >> (WIDTH * i)) & ((1u << WIDTH) - 1);
        }
    }
}

template <int VALUE_BITS>
inline void encode_group(
    Group& group, int keep, uint64_t start, uint64_t key, uint8_t* index, uint8_t* values, uint16_t* scale,
    Word* zero) {
    const int num = BLOCKS * keep;
    if constexpr (POSITION_BITS > 0) {
        keep == 2 ? select_places<2>(group) : select_places<3>(group);
        pack_fields<POSITION_BITS>(group.places, num, index);
    } else {
        select_bits(group, keep, index);
    }
    for (int j = 0; j < num; ++j) {
        group.kept[j] = group.elements[group.places[j]];
    }
    if constexpr (VALUE_BITS == 16) {
        uint16_t* halves = reinterpret_cast<uint16_t*>(values);
        for (int j = 0; j < num; ++j) {
            halves[j] = to_16_bits(group.kept[j]);
        }
    } else {
        const auto place = [&group](int j) { return group.places[j]; };
        encode_values<(1 << VALUE_BITS) - 1>(group.kept, num, start, key, place, group.codes, scale, zero);
        pack_fields<VALUE_BITS>(group.codes, num, values);
    }
}

template <int VALUE_BITS>
inline void decode_group(
    Group& group, int keep, const uint8_t* index, const uint8_t* values, const uint16_t* scale, const Word* zero,
    Word* x) {
    const int num = BLOCKS * keep;
    if constexpr (VALUE_BITS == 16) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(values);
        for (int j = 0; j < num; ++j) {
            group.kept[j] = static_cast<Word>(static_cast<uint32_t>(halves[j]) << (8 * sizeof(Word) - 16));
        }
    } else {
        const float step = bits_of<float>(static_cast<uint32_t>(*scale) << 16), origin = to_float(*zero);
        const int marked = *scale & 0x8000 ? (1 << VALUE_BITS) - 1 : -1;
        unpack_fields<VALUE_BITS>(values, num, group.codes);
#pragma omp simd
        for (int j = 0; j < num; ++j) {
            const float code = static_cast<float>(group.codes[j]);
            group.kept[j] = group.codes[j] == marked ? MAGNITUDE : from_float(origin + step * code);
        }
    }
    std::memset(x, 0, GROUP * sizeof(Word));
    const Word* value = group.kept;
    if constexpr (POSITION_BITS > 0) {
        unpack_fields<POSITION_BITS>(index, num, group.flags);
        for (int b = 0; b < BLOCKS; ++b) {
            for (int j = b * keep; j < (b + 1) * keep; ++j) {
                x[b * BLOCK + group.flags[j]] = value[j];
            }
        }
    } else {
        for (int i = 0; i < BLOCK / 64; ++i) {
            uint64_t word;
            std::memcpy(&word, index + 8 * i, 8);
            for (; word; word &= word - 1) {
                x[64 * i + __builtin_ctzll(word)] = *value++;
            }
        }
    }
}

template <int VALUE_BITS>
inline void run(
    Word* x,             // [numel], 1 or more; written where `decodes`
    const int64_t* seed,  // []
    uint8_t* index, uint8_t* values, uint16_t* scale, Word* zero, int64_t salt_key, int64_t numel, int64_t threads,
    int keep, bool decodes) {
    const int64_t groups = (numel + GROUP - 1) / GROUP, key = *seed ^ salt_key;
    const int index_nbytes = POSITION_BITS > 0 ? BLOCKS * keep * POSITION_BITS / 8 : BLOCK / 8;
    const int value_nbytes = (BLOCKS * keep * VALUE_BITS + 7) / 8;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Group> scratch(1);
        Group& group = scratch[0];
#pragma omp for
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t start = g * GROUP, rest = numel - start < GROUP ? numel - start : GROUP;
            uint8_t *index_out = index + g * index_nbytes, *values_out = values + g * value_nbytes;
            if (decodes) {
                Word* elements = rest < GROUP ? group.elements : x + start;
                decode_group<VALUE_BITS>(group, keep, index_out, values_out, scale + g, zero + g, elements);
                if (rest < GROUP) {
                    std::memcpy(x + start, elements, rest * sizeof(Word));
                }
                continue;
            }
            std::memcpy(group.elements, x + start, rest * sizeof(Word));
            std::memset(group.elements + rest, 0, (GROUP - rest) * sizeof(Word));
#pragma omp simd
            for (int i = 0; i < GROUP; ++i) {
                group.keys[i] = group.elements[i] & MAGNITUDE;
            }
            encode_group<VALUE_BITS>(group, keep, start, key, index_out, values_out, scale + g, zero + g);
        }
    }
}

extern "C" void kernel(
    Word* x, const int64_t* seed, uint8_t* index, uint8_t* values, uint16_t* scale, Word* zero, int64_t salt_key,
    int64_t numel, int64_t threads, int64_t keep, int64_t value_bits, int64_t decodes) {
    const auto body = value_bits == 16 ? run<16> : value_bits == 8 ? run<8> : run<4>;
    body(x, seed, index, values, scale, zero, salt_key, numel, threads, static_cast<int>(keep), decodes != 0);
}
