/* Convolutions that compute selected channels from selected channels, without a copy of the weight.
 *
 * A product of matrices in tiles, as BLIS describes it (Van Zee and van de Geijn, 2015), on rows that are found by pointer, as
 * in an indirect convolution (Dukhan, arXiv:1907.02129). What is ours is the packing: only the selected rows of the weight are
 * read, and the selected columns are taken while they are packed, into a block that stays in the cache.
 *
 * Feature maps are channels-last, weights are (places of the filter, inputs, outputs), numbers are float32, positions of
 * channels ascend. Compiled by `compiled.py`; ordinary vector code, which compilers map to the machine at hand.
 *
 * Callers say how many numbers each buffer holds. Whatever does not fit its buffer is refused before anything is read, so that
 * no argument, however wrong, reaches foreign memory.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define WIDE 4
#elif defined(__AVX2__)
#define LANES 8
#define WIDE 2
#elif defined(__ARM_NEON)
#define LANES 4
#define WIDE 4
#else
#define LANES 4
#define WIDE 2
#endif

#define TALL 6    /* rows of a tile: with WIDE vectors of columns its sums fill the registers */
#define DEEP 128  /* rows of the weight packed at once: a panel of them stays in the first cache */
#define LINE 16   /* numbers in a line of the cache */
#ifndef AHEAD
#define AHEAD 4   /* rows of the weight that are asked for before they are packed */
#endif
#define PANEL (WIDE * LANES)
#define PLACES 96        /* of a map, whose sums for a panel stay in the first cache */
#define PACKED (1 << 18) /* numbers of a packed weight that stay in the second cache */

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

typedef struct {
  int64_t batch, in_height, in_width, out_height, out_width;
  int64_t filter_height, filter_width, stride_y, stride_x, pad_y, pad_x, gap_y, gap_x;
  int64_t inputs, all_inputs, input_stride;    /* channels used, of the weight, between two places of the map */
  int64_t outputs, all_outputs, output_stride;
  int64_t input_size, weight_size, bias_size, output_size; /* numbers in each buffer */
  int64_t column_size, row_size;                           /* positions in each list */
} Shape;

enum { NO_MEMORY = 0, DONE = 1, REFUSED = -1 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Whether numbers lie between a lowest one and the largest that two of them can be multiplied of. */
static int within(const int64_t *numbers, int count, int64_t lowest) {
  for (int i = 0; i < count; i++)
    if (numbers[i] < lowest || numbers[i] > INT32_MAX) return 0;
  return 1;
}

static int is_product(int64_t size, int64_t a, int64_t b, int64_t c, int64_t d) {
  int64_t product = a;
  return !__builtin_mul_overflow(product, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
         !__builtin_mul_overflow(product, d, &product) && product == size;
}

/* Whether the first `used` of `size` positions ascend within `all`; no list stands for the first `used` channels. */
static int are_positions(const int64_t *positions, int64_t size, int64_t used, int64_t all) {
  if (used > all) return 0;
  if (!positions) return 1;
  if (size < used || positions[0] < 0 || positions[used - 1] >= all) return 0;
  for (int64_t i = 1; i < used; i++)
    if (positions[i] <= positions[i - 1]) return 0;
  return 1;
}

/* Whether everything that `convolve` will read and write lies in its buffers. */
static int fits(const Shape *s, const void *bias, const int64_t *columns, const int64_t *rows) {
  const int64_t positive[] = {s->batch,         s->in_height,  s->in_width,     s->out_height, s->out_width,
                              s->filter_height, s->filter_width, s->stride_y,   s->stride_x,   s->gap_y,
                              s->gap_x,         s->inputs,     s->all_inputs,   s->outputs,    s->all_outputs};
  const int64_t padding[] = {s->pad_y, s->pad_x};
  return within(positive, sizeof positive / sizeof *positive, 1) && within(padding, 2, 0) && s->inputs <= s->input_stride &&
         s->outputs <= s->output_stride && is_product(s->input_size, s->batch, s->in_height, s->in_width, s->input_stride) &&
         is_product(s->weight_size, s->filter_height, s->filter_width, s->all_inputs, s->all_outputs) &&
         (!bias || s->bias_size == s->all_outputs) &&
         is_product(s->output_size, s->batch, s->out_height, s->out_width, s->output_stride) &&
         are_positions(columns, s->column_size, s->inputs, s->all_inputs) &&
         are_positions(rows, s->row_size, s->outputs, s->all_outputs);
}

static inline __attribute__((always_inline)) void tile(const int tall, const int wide, const float *const *rows, int64_t deep,
                                                       const float *panel, float *out, int64_t out_stride, int64_t width) {
  vector sums[TALL][WIDE];
  const int64_t rest = width - (wide - 1) * LANES; /* of the last vector */
#pragma GCC unroll 8
  for (int i = 0; i < tall; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) {
      if (j == wide - 1 && rest < LANES) {
        memset(&sums[i][j], 0, sizeof(vector));
        memcpy(&sums[i][j], out + i * out_stride + j * LANES, rest * sizeof(float));
      } else {
        sums[i][j] = *(const vector *)(out + i * out_stride + j * LANES);
      }
    }
  }
  for (int64_t k = 0; k < deep; k++) {
    vector right[WIDE];
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) right[j] = *(const vector *)(panel + (k * wide + j) * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < tall; i++) {
      const float left = rows[i][k];
#pragma GCC unroll 8
      for (int j = 0; j < wide; j++) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tall; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) {
      if (j == wide - 1 && rest < LANES)
        memcpy(out + i * out_stride + j * LANES, &sums[i][j], rest * sizeof(float));
      else
        *(vector *)(out + i * out_stride + j * LANES) = sums[i][j];
    }
  }
}

#define CASE(tall, wide)                                                  \
  case (tall) * 8 + (wide):                                               \
    tile(tall, wide, rows, deep, panel, out, out_stride, width);          \
    break;
#define CASES(wide) CASE(1, wide) CASE(2, wide) CASE(3, wide) CASE(4, wide) CASE(5, wide) CASE(6, wide)

static void any_tile(int64_t tall, const float *const *rows, int64_t deep, const float *panel, float *out, int64_t out_stride,
                     int64_t width) {
  switch (tall * 8 + (width + LANES - 1) / LANES) {
    CASES(1) CASES(2)
#if WIDE > 2
    CASES(3) CASES(4)
#endif
  }
}

/* Take the selected of one row of the weight: `take` holds what is worked out once for all rows. */
typedef struct {
  const int64_t *positions; /* NULL: all, from `first` */
  int64_t first, count;
#if defined(__AVX512F__)
  int64_t chunks;
  int32_t *at, *to;
  uint16_t *lanes;
#endif
} Take;

static int plan(Take *take) {
#if defined(__AVX512F__)
  take->at = take->to = NULL;
  take->lanes = NULL;
  take->chunks = 0;
  if (!take->positions) return 1;
  take->at = malloc(take->count * sizeof(int32_t));
  take->to = malloc(take->count * sizeof(int32_t));
  take->lanes = malloc(take->count * sizeof(uint16_t));
  if (!take->at || !take->to || !take->lanes) return 0;
  for (int64_t i = 0; i < take->count;) {
    const int64_t start = take->positions[i];
    take->at[take->chunks] = start;
    take->to[take->chunks] = i;
    uint16_t lanes = 0;
    for (; i < take->count && take->positions[i] - start < LANES; i++) lanes |= 1u << (take->positions[i] - start);
    take->lanes[take->chunks++] = lanes;
  }
#endif
  return 1;
}

static void forget(Take *take) {
#if defined(__AVX512F__)
  free(take->at);
  free(take->to);
  free(take->lanes);
#endif
}

/* `next` is a row that will be taken soon: rows that are not selected lie between, so no processor guesses where it is. */
static void take_row(const Take *take, const float *row, const float *next, float *to) {
  if (!take->positions) {
    for (int64_t i = take->first; i < take->first + take->count; i += LINE) __builtin_prefetch(next + i);
    memcpy(to, row + take->first, take->count * sizeof(float));
    return;
  }
  for (int64_t i = take->positions[0]; i < take->positions[take->count - 1]; i += LINE) __builtin_prefetch(next + i);
#if defined(__AVX512F__)
  for (int64_t i = 0; i < take->chunks; i++) {
    const __mmask16 lanes = take->lanes[i];
    _mm512_storeu_ps(to + take->to[i], _mm512_maskz_compress_ps(lanes, _mm512_maskz_loadu_ps(lanes, row + take->at[i])));
  }
#else
  for (int64_t i = 0; i < take->count; i++) to[i] = row[take->positions[i]];
#endif
}

/* What one thread computes: outputs first..first + count of the places from..to, in memory order. */
typedef struct {
  const Shape *shape;
  const float *input, *weight, *bias;
  const int64_t *columns, *rows;
  int64_t first, count, padded, from, to;
  float *output, *row, *nothing;
  const float **starts;
  Take take;
} Part;

static void begin_outputs(const Part *part) {
  const Shape *s = part->shape;
  for (int64_t p = part->from; p < part->to; p++) {
    float *out = part->output + p * s->output_stride + part->first;
    if (!part->bias)
      memset(out, 0, part->count * sizeof(float));
    else if (!part->rows)
      memcpy(out, part->bias + part->first, part->count * sizeof(float));
    else
      for (int64_t i = 0; i < part->count; i++) out[i] = part->bias[part->rows[part->first + i]];
    if (part->first + part->count == s->outputs)
      memset(out + part->count, 0, (s->output_stride - s->outputs) * sizeof(float));
  }
}

/* Find what one place of the filter sees from places low..high; returns how many of them see no padding. */
static int64_t find_rows(const Part *part, int64_t place, int64_t low, int64_t high) {
  const Shape *s = part->shape;
  const int64_t fy = place / s->filter_width * s->gap_y, fx = place % s->filter_width * s->gap_x;
  int64_t inside = 0;
  for (int64_t p = low; p < high; p++) {
    const int64_t x = p % s->out_width * s->stride_x - s->pad_x + fx;
    const int64_t y = p / s->out_width % s->out_height * s->stride_y - s->pad_y + fy;
    const int64_t image = p / (s->out_width * s->out_height);
    const int in = x >= 0 && x < s->in_width && y >= 0 && y < s->in_height;
    part->starts[p - low] = in ? part->input + ((image * s->in_height + y) * s->in_width + x) * s->input_stride : NULL;
    inside += in;
  }
  return inside;
}

/* Copy what is selected of some rows of the weight into panels, each as wide as a tile. */
static void pack(const Part *part, int64_t place, int64_t from, int64_t deep, float *block) {
  const Shape *s = part->shape;
  const float *weight = part->weight + place * s->all_inputs * s->all_outputs;
  for (int64_t i = 0; i < deep; i++) {
    const int64_t now = from + i, soon = smaller(now + AHEAD, s->inputs - 1);
    const int64_t row = part->columns ? part->columns[now] : now, next = part->columns ? part->columns[soon] : soon;
    take_row(&part->take, weight + row * s->all_outputs, weight + next * s->all_outputs, part->row);
    for (int64_t j = part->count; j < part->padded; j++) part->row[j] = 0;
    for (int64_t j = 0; j < part->padded; j += PANEL) {
      const int64_t width = smaller(PANEL, part->padded - j);
      float *panel = block + j * deep + i * width;
      for (int64_t v = 0; v < width; v += LANES) *(vector *)(panel + v) = *(const vector *)(part->row + j + v);
    }
  }
}

static void multiply(const Part *part, int64_t from, int64_t deep, const float *block, int64_t low, int64_t high) {
  const int64_t stride = part->shape->output_stride, tiles = (high - low + TALL - 1) / TALL;
  for (int64_t j = 0; j < part->count; j += PANEL) {
    for (int64_t t = 0; t < tiles; t++) {
      /* Tiles of equal height: a last one of a single row would cost nearly as much as a whole one. */
      const int64_t top = t * (high - low) / tiles, bottom = (t + 1) * (high - low) / tiles;
      const float *rows[TALL];
      int any = 0;
      for (int64_t p = top; p < bottom; p++) {
        rows[p - top] = part->starts[p] ? part->starts[p] + from : part->nothing;
        any |= part->starts[p] != NULL;
      }
      if (any)
        any_tile(bottom - top, rows, deep, block + j * deep, part->output + (low + top) * stride + part->first + j, stride,
                 smaller(PANEL, part->count - j));
    }
  }
}

/* Returns 0 where memory ran out. */
static int compute(Part *part) {
  const Shape *s = part->shape;
  const int64_t filter = s->filter_height * s->filter_width, places = part->to - part->from;
  part->padded = (part->count + LANES - 1) / LANES * LANES;
  /* On large maps sums of a few places stay in the cache for the whole filter, if the packed weight does. */
  const int64_t packed = filter * s->inputs * part->padded;
  const int whole = places > PLACES && packed <= PACKED;
  const int64_t step = whole ? PLACES : places;
  float *block = aligned_alloc(64, ((whole ? packed : DEEP * part->padded) * sizeof(float) + 63) / 64 * 64);
  part->row = calloc(part->padded + LANES, sizeof(float));
  part->nothing = calloc(DEEP, sizeof(float));
  part->starts = malloc(step * sizeof(float *));
  part->take = (Take){.positions = part->rows ? part->rows + part->first : NULL, .first = part->first, .count = part->count};
  const int planned = plan(&part->take), ready = planned && block && part->row && part->nothing && part->starts;
  if (ready) {
    begin_outputs(part);
    for (int64_t low = part->from; low < part->to; low += step) {
      const int64_t high = smaller(low + step, part->to);
      for (int64_t f = 0; f < filter; f++) {
        /* On small maps whole places of the filter see nothing but padding. */
        if (!find_rows(part, f, low, high) && !whole) continue;
        for (int64_t k = 0; k < s->inputs; k += DEEP) {
          const int64_t deep = smaller(DEEP, s->inputs - k);
          float *here = whole ? block + (f * s->inputs + k) * part->padded : block;
          if (!whole || low == part->from) pack(part, f, k, deep, here);
          multiply(part, k, deep, here, low, high);
        }
      }
    }
  }
  forget(&part->take);
  free(block);
  free(part->row);
  free(part->nothing);
  free(part->starts);
  return ready;
}

/* Returns DONE; NO_MEMORY where the output is not to be used; REFUSED where arguments do not fit each other. */
int convolve(const Shape *s, const float *input, const float *weight, const float *bias, float *output, const int64_t *columns,
             const int64_t *rows, int64_t threads) {
  if (!fits(s, bias, columns, rows) || threads < 1) return REFUSED;
  const int64_t places = s->batch * s->out_height * s->out_width, vectors = (s->outputs + LANES - 1) / LANES;
  const int by_places = places >= 4 * s->outputs || vectors < threads;
  int done = DONE;
  threads = smaller(threads, by_places ? places : vectors);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(& : done) if (threads > 1)
  for (int64_t t = 0; t < threads; t++) {
    Part part = {.shape = s, .input = input, .weight = weight, .bias = bias, .columns = columns, .rows = rows, .output = output,
                 .count = s->outputs, .to = places};
    if (by_places) {
      part.from = t * places / threads;
      part.to = (t + 1) * places / threads;
    } else {
      part.first = t * vectors / threads * LANES;
      part.count = smaller((t + 1) * vectors / threads * LANES, s->outputs) - part.first;
    }
    done &= compute(&part);
  }
  return done;
}

/* Average a map over its places, in groups of a few, so that small numbers are not lost in large sums. */
static void average(const float *input, int64_t places, int64_t channels, int64_t stride, float *means, float *group) {
  memset(means, 0, channels * sizeof(float));
  for (int64_t p = 0; p < places; p += 64) {
    const int64_t end = smaller(p + 64, places);
    memset(group, 0, channels * sizeof(float));
    for (int64_t q = p; q < end; q++)
      for (int64_t c = 0; c < channels; c++) group[c] += input[q * stride + c];
    for (int64_t c = 0; c < channels; c++) means[c] += group[c];
  }
  for (int64_t c = 0; c < channels; c++) means[c] /= places;
}

/* What a predictor reads of means, in place: how far each stands, on their common scale, above a mean of zero.
 *
 * Means that are not there are zero, and so is what is read of them; they count in the scale. */
static void describe(float *means, int64_t present, int64_t all, int standard) {
  double sum = 0, square = 0;
  if (standard) {
    for (int64_t c = 0; c < present; c++) sum += means[c];
    const double mean = sum / all;
    for (int64_t c = 0; c < present; c++) square += (means[c] - mean) * (means[c] - mean);
    square += (all - present) * mean * mean;
    const double scale = 1.0 / sqrt(square / all + 1e-5);
    for (int64_t c = 0; c < present; c++) means[c] = (float)(means[c] * scale);
    return;
  }
  float most = present < all ? 0 : -INFINITY;
  for (int64_t c = 0; c < present; c++) most = means[c] > most ? means[c] : most;
  for (int64_t c = 0; c < present; c++) sum += means[c] = expf(means[c] - most);
  sum += (all - present) * exp(-(double)most);
  const double zero = exp(-(double)most) / sum, share = zero < 1 ? zero : 1;
  for (int64_t c = 0; c < present; c++) means[c] = (float)(means[c] / sum - share);
}

typedef struct {
  int64_t places;
  int64_t inputs, input_stride, weight_inputs, all_inputs; /* at hand, in memory, of the weight, in the scale of means */
  int64_t outputs, standard;
  int64_t input_size, weight_size, bias_size, logits_size, chosen_size, column_size;
} Question;

/* Predict from the means of one map which outputs are needed: those with a positive logit, else the likeliest one.
 *
 * The weight is (inputs, outputs); rows of inputs that are not there are not read. Writes the positions chosen and all logits;
 * returns how many are chosen, NO_MEMORY or REFUSED. */
int64_t choose(const Question *q, const float *input, const int64_t *columns, const float *weight, const float *bias,
               float *logits, int64_t *chosen) {
  const int64_t positive[] = {q->places, q->inputs, q->input_stride, q->weight_inputs, q->all_inputs, q->outputs};
  if (!within(positive, 6, 1) || q->weight_inputs > q->all_inputs || q->inputs > q->input_stride ||
      !is_product(q->input_size, 1, 1, q->places, q->input_stride) || !is_product(q->weight_size, 1, 1, q->weight_inputs, q->outputs) ||
      q->bias_size != q->outputs || q->logits_size != q->outputs || q->chosen_size != q->outputs ||
      !are_positions(columns, q->column_size, q->inputs, q->weight_inputs))
    return REFUSED;
  float *means = malloc(2 * q->inputs * sizeof(float));
  if (!means) return NO_MEMORY;
  average(input, q->places, q->inputs, q->input_stride, means, means + q->inputs);
  describe(means, q->inputs, q->all_inputs, q->standard != 0);
  memcpy(logits, bias, q->outputs * sizeof(float));
  for (int64_t i = 0; i < q->inputs; i++) {
    const float *row = weight + (columns ? columns[i] : i) * q->outputs, value = means[i];
    for (int64_t o = 0; o < q->outputs; o++) logits[o] += value * row[o];
  }
  free(means);
  int64_t count = 0, best = 0;
  for (int64_t o = 0; o < q->outputs; o++) {
    if (logits[o] > logits[best]) best = o;
    if (logits[o] > 0) chosen[count++] = o;
  }
  if (!count) chosen[count++] = best;
  return count;
}
