/* Fuzzing of the kernels, to be run under sanitizers: argument 1 is the number of rounds, 2 the seed.
 *
 * Each round makes a call that is right, in buffers of exactly its size, and compares it with sums in double precision; then it
 * spoils one number or one position of the same call. That must be refused, or compute within its buffers.
 */

#include "kernels.c"

#include <stdio.h>

static uint64_t state;

static int64_t draw(int64_t low, int64_t high) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return low + (int64_t)(state % (uint64_t)(high - low + 1));
}

static float *numbers(int64_t size) {
  float *found = malloc(size * sizeof(float));
  for (int64_t i = 0; i < size; i++) found[i] = (float)draw(-1000, 1000) / 1000;
  return found;
}

static int64_t *subset(int64_t all, int64_t count) {
  int64_t *found = malloc(count * sizeof(int64_t)), taken = 0;
  for (int64_t i = 0; taken < count; i++)
    if (draw(1, all - i) <= count - taken) found[taken++] = i;
  return found;
}

static int64_t wild(void) {
  const int64_t values[] = {-1, 0, 1, 2, 17, 1 << 20, INT32_MAX, (int64_t)INT32_MAX + 1, INT64_MAX, INT64_MIN};
  return values[draw(0, 9)];
}

static int differs(double found, double expected, double size) { return !(fabs(found - expected) <= 1e-5 * size); }

static int check_output(const Shape *s, const float *input, const float *weight, const float *bias, const float *output,
                        const int64_t *columns, const int64_t *rows) {
  int64_t at = 0;
  for (int64_t b = 0; b < s->batch; b++)
    for (int64_t y = 0; y < s->out_height; y++)
      for (int64_t x = 0; x < s->out_width; x++)
        for (int64_t o = 0; o < s->output_stride; o++, at++) {
          double sum = 0, size = 1;
          const int64_t row = o >= s->outputs ? 0 : rows ? rows[o] : o;
          if (o < s->outputs && bias) sum = bias[row];
          for (int64_t f = 0; o < s->outputs && f < s->filter_height * s->filter_width; f++) {
            const int64_t v = y * s->stride_y - s->pad_y + f / s->filter_width * s->gap_y;
            const int64_t u = x * s->stride_x - s->pad_x + f % s->filter_width * s->gap_x;
            if (v < 0 || u < 0 || v >= s->in_height || u >= s->in_width) continue;
            for (int64_t i = 0; i < s->inputs; i++) {
              const int64_t column = columns ? columns[i] : i;
              const double term = (double)input[((b * s->in_height + v) * s->in_width + u) * s->input_stride + i] *
                                  weight[(f * s->all_inputs + column) * s->all_outputs + row];
              sum += term;
              size += fabs(term);
            }
          }
          if (differs(output[at], sum, size)) return 1;
        }
  return 0;
}

static int fuzz_convolve(void) {
  Shape s = {.batch = draw(1, 3), .in_height = draw(1, 12), .in_width = draw(1, 12)};
  s.filter_height = draw(1, 4), s.filter_width = draw(1, 4), s.stride_y = draw(1, 3), s.stride_x = draw(1, 3);
  s.pad_y = draw(0, 3), s.pad_x = draw(0, 3), s.gap_y = draw(1, 3), s.gap_x = draw(1, 3);
  s.out_height = s.in_height + 2 * s.pad_y - s.gap_y * (s.filter_height - 1) - 1;
  s.out_width = s.in_width + 2 * s.pad_x - s.gap_x * (s.filter_width - 1) - 1;
  if (s.out_height < 0 || s.out_width < 0) return 0;
  s.out_height = s.out_height / s.stride_y + 1, s.out_width = s.out_width / s.stride_x + 1;
  s.all_inputs = draw(1, draw(0, 4) ? 30 : 200), s.all_outputs = draw(1, draw(0, 4) ? 40 : 150);
  s.inputs = draw(1, s.all_inputs), s.outputs = draw(1, s.all_outputs);
  s.input_stride = s.inputs + draw(0, 5), s.output_stride = s.outputs + draw(0, 5);
  s.input_size = s.batch * s.in_height * s.in_width * s.input_stride;
  s.weight_size = s.filter_height * s.filter_width * s.all_inputs * s.all_outputs;
  s.bias_size = s.all_outputs, s.output_size = s.batch * s.out_height * s.out_width * s.output_stride;
  s.column_size = s.inputs, s.row_size = s.outputs;
  float *input = numbers(s.input_size), *weight = numbers(s.weight_size), *output = numbers(s.output_size);
  float *bias = draw(0, 1) ? numbers(s.bias_size) : NULL;
  int64_t *columns = draw(0, 2) ? subset(s.all_inputs, s.inputs) : NULL, *rows = draw(0, 2) ? subset(s.all_outputs, s.outputs) : NULL;
  int bad = convolve(&s, input, weight, bias, output, columns, rows, draw(1, 5)) != DONE ||
            check_output(&s, input, weight, bias, output, columns, rows);
  for (int i = 0; i < 4; i++) {
    Shape spoilt = s;
    int64_t *list = draw(0, 1) ? columns : rows;
    if (draw(0, 3) || !list) {
      ((int64_t *)&spoilt)[draw(0, sizeof spoilt / sizeof(int64_t) - 1)] = wild();
      convolve(&spoilt, input, weight, bias, output, columns, rows, draw(0, 9) ? 1 : wild() % 64);
    } else {
      const int64_t at = draw(0, (list == columns ? s.inputs : s.outputs) - 1), before = list[at];
      list[at] = draw(0, 1) ? wild() : before - 1;
      convolve(&s, input, weight, bias, output, columns, rows, 1);
      list[at] = before;
    }
  }
  free(input), free(weight), free(output), free(bias), free(columns), free(rows);
  return bad;
}

static int check_choice(const Question *q, const float *input, const int64_t *columns, const float *weight, const float *bias,
                        const float *logits, const int64_t *chosen, int64_t count) {
  double *means = calloc(q->all_inputs, sizeof(double)), sum = 0, square = 0;
  for (int64_t i = 0; i < q->inputs; i++)
    for (int64_t p = 0; p < q->places; p++)
      means[columns ? columns[i] : i] += (double)input[p * q->input_stride + i] / q->places;
  for (int64_t c = 0; c < q->all_inputs; c++) sum += q->standard ? means[c] : exp(means[c]);
  const double mean = sum / q->all_inputs;
  for (int64_t c = 0; c < q->all_inputs; c++) square += (means[c] - mean) * (means[c] - mean);
  const double scale = 1 / sqrt(square / q->all_inputs + 1e-5), zero = q->standard ? -mean * scale : fmin(1 / sum, 1);
  int bad = 0;
  int64_t at = 0;
  for (int64_t o = 0; o < q->outputs; o++) {
    double expected = bias[o], size = 1;
    for (int64_t c = 0; c < q->weight_inputs; c++) {
      const double value = (q->standard ? (means[c] - mean) * scale : exp(means[c]) / sum) - zero;
      expected += value * weight[c * q->outputs + o];
      size += 10 * (fabs(value) + fabs(zero)) * fabs(weight[c * q->outputs + o]);
    }
    bad |= differs(logits[o], expected, size);
    if (logits[o] > 0) bad |= at >= count || chosen[at++] != o;
  }
  free(means);
  return bad || (at ? at != count : count != 1 || chosen[0] < 0 || chosen[0] >= q->outputs);
}

static int fuzz_choose(void) {
  Question q = {.places = draw(1, 90), .weight_inputs = draw(1, 60), .outputs = draw(1, 70), .standard = draw(0, 1)};
  q.inputs = draw(1, q.weight_inputs), q.input_stride = q.inputs + draw(0, 4), q.all_inputs = q.weight_inputs + draw(0, 1) * draw(1, 9);
  q.input_size = q.places * q.input_stride, q.weight_size = q.weight_inputs * q.outputs;
  q.bias_size = q.logits_size = q.chosen_size = q.outputs, q.column_size = q.inputs;
  float *input = numbers(q.input_size), *weight = numbers(q.weight_size), *bias = numbers(q.outputs), *logits = numbers(q.outputs);
  int64_t *columns = draw(0, 2) ? subset(q.weight_inputs, q.inputs) : NULL, *chosen = malloc(q.outputs * sizeof(int64_t));
  const int64_t count = choose(&q, input, columns, weight, bias, logits, chosen);
  int bad = count < 1 || count > q.outputs || check_choice(&q, input, columns, weight, bias, logits, chosen, count);
  for (int i = 0; i < 4; i++) {
    Question spoilt = q;
    ((int64_t *)&spoilt)[draw(0, sizeof spoilt / sizeof(int64_t) - 1)] = wild();
    choose(&spoilt, input, columns, weight, bias, logits, chosen);
  }
  for (int i = 0; i < 6; i++) { /* no buffer may be said to be smaller than it must be; without a list there is no size of it */
    Question less = q;
    int64_t *sizes[] = {&less.input_size, &less.weight_size, &less.bias_size, &less.logits_size, &less.chosen_size, &less.column_size};
    *sizes[i] -= 1;
    if (i < 5 || columns) bad |= choose(&less, input, columns, weight, bias, logits, chosen) != REFUSED;
  }
  free(input), free(weight), free(bias), free(logits), free(columns), free(chosen);
  return bad;
}

int main(int count, char **words) {
  if (count != 3) return 2;
  state = strtoull(words[2], NULL, 10) * 2 + 1;
  int bad = 0;
  for (int64_t i = atol(words[1]); i > 0; i--) bad += fuzz_convolve() + fuzz_choose();
  printf("%d wrong\n", bad);
  return bad != 0;
}
