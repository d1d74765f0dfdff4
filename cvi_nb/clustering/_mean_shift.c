/* Written by nbs/02_clustering/02_compiled.ipynb, which explains it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

#define LANES 8
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t vl __attribute__((vector_size(32)));

INLINE vf where(vi mask, vf v) { return (vf)((vi)v & mask); }

INLINE float total(vf v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

/* exp(x) for -80 <= x <= 0 */
INLINE vf exponential(vf x) {
    vf shifted = x * 1.44269504f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi bits = (vi)shifted << 23; /* the low mantissa bits of `shifted` are n */
    return (vf)((vi)p + bits);
}

struct image {
    const float *planes; /* (channels, height, stride), range coordinates over their bandwidth */
    int channels, height, width, stride;
    float radius, reach, tolerance;
    int ball, normal, max_iterations;
};

/* Whether one pixel lies in the window, in double precision. */
INLINE int decide(const struct image *im, const int channels, const int ball, int row, int column, const double *point) {
    const double dy = row - point[0], dx = column - point[1], reach2 = (double)im->reach * im->reach;
    const double radius2 = (double)im->radius * im->radius;
    double d_space = dx * dx + dy * dy, d_range = 0;
    for (int c = 0; c < channels; c++) {
        const double d = im->planes[((int64_t)c * im->height + row) * im->stride + column] - point[2 + c];
        d_range += d * d;
    }
    return ball ? d_space / radius2 + d_range <= reach2 : (d_space <= radius2 * reach2) & (d_range <= reach2);
}

INLINE int any(vi mask) {
    const vl pairs = (vl)mask;
    return ((pairs[0] | pairs[1]) | (pairs[2] | pairs[3])) != 0;
}

/* The range of `point` in two floats a channel, which together have the digits of a double. */
INLINE void in_two_parts(const double *point, const int channels, float *high, float *low) {
    for (int c = 0; c < channels; c++) {
        high[c] = point[2 + c];
        low[c] = point[2 + c] - high[c];
    }
}

INLINE int climb(const struct image *im, const int channels, const int ball, const int normal, double *point, float *moved) {
    const float radius2 = im->radius * im->radius, reach2 = im->reach * im->reach;
    const float limit = radius2 * reach2, edge = im->radius * im->reach, scale = 1.0f / radius2;
    const float more = 1 + 4e-6f, less = 1 - 4e-6f; /* beyond these, single precision decides alone */
    int careful = 0;
    vf lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    int iteration = 0;
    while (iteration < im->max_iterations) {
        const double y = point[0], x = point[1];
        const int top = (int)ceil(fmax(y - edge, 0)), bottom = (int)floor(fmin(y + edge, im->height - 1));
        const int left = (int)ceil(fmax(x - edge, 0)), right = (int)floor(fmin(x + edge, im->width - 1));
        /* on the pixel grid squared distances are whole numbers, and exact */
        const int whole = !ball && y == floor(y) && x == floor(x);
        const float far_more = limit * (whole ? 1 : more), far_less = limit * (whole ? 1 : less);
        vi doubt = {0}, members = {0};
        vf weight = {0}, sum_y = {0}, sum_x = {0}, sum[channels];
        float high[channels], low[channels];
        in_two_parts(point, channels, high, low);
        for (int c = 0; c < channels; c++) sum[c] = (vf){0};
        for (int row = top; row <= bottom; row++) {
            const float dy = row - y, dy2 = dy * dy, down = row - top;
            for (int column = left; column <= right; column += LANES) {
                const float *at = im->planes + (int64_t)row * im->stride + column;
                const vf across = lane + (float)(column - left);
                vf dx = lane + (float)(column - x), d_space = dx * dx + dy2, d_range = {0}, d[channels];
                for (int c = 0; c < channels; c++) {
                    d[c] = (*(const vf_loose *)(at + (int64_t)c * im->height * im->stride) - high[c]) - low[c];
                    d_range += d[c] * d[c];
                }
                vi inside, surely;
                if (ball) {
                    const vf joint = d_space * scale + d_range;
                    inside = joint <= reach2 * more;
                    surely = joint <= reach2 * less;
                } else {
                    inside = (d_space <= far_more) & (d_range <= reach2 * more);
                    surely = (d_space <= far_less) & (d_range <= reach2 * less);
                }
                doubt |= inside ^ surely;
                if (careful && any(inside ^ surely))
                    for (int i = 0; i < LANES; i++)
                        if (inside[i] != surely[i]) inside[i] = -decide(im, channels, ball, row, column + i, point);
                vf w;
                if (normal) {
                    vf e = (d_space * scale + d_range) * -0.5f;
                    e = where(e >= -80.0f, e + 80.0f) - 80.0f;
                    w = where(inside, exponential(e));
                    weight += w;
                    sum_y += w * down;
                    sum_x += w * across;
                    for (int c = 0; c < channels; c++) sum[c] += w * d[c];
                } else {
                    const vf zero = {0};
                    members -= inside;
                    sum_y += where(inside, zero + down);
                    sum_x += where(inside, across);
                    for (int c = 0; c < channels; c++) sum[c] += where(inside, d[c]);
                }
            }
        }
        if (!careful && any(doubt)) {
            careful = 1; /* once more, with a second look at each doubtful pixel */
            continue;
        }
        careful = 0;
        iteration++;
        for (int i = 0; i < LANES; i++) weight[i] += members[i];
        const double n = total(weight);
        *moved = 0;
        if (n <= 0) break;
        point[0] = top + total(sum_y) / n;
        point[1] = left + total(sum_x) / n;
        double shift2 = ((point[0] - y) * (point[0] - y) + (point[1] - x) * (point[1] - x)) / ((double)im->radius * im->radius);
        for (int c = 0; c < channels; c++) {
            const double step = total(sum[c]) / n;
            point[2 + c] += step;
            shift2 += step * step;
        }
        *moved = shift2;
        if (shift2 <= (double)im->tolerance * im->tolerance) break;
    }
    return iteration;
}

/* The weight of the normal window around `point`, and the step (pixels, range bandwidths) from there to its mean. */
INLINE double step_to_mean(const struct image *im, const int channels, const int ball, const double *point, double *step) {
    const float radius2 = im->radius * im->radius, reach2 = im->reach * im->reach;
    const float limit = radius2 * reach2, edge = im->radius * im->reach, scale = 1.0f / radius2;
    const double y = point[0], x = point[1];
    const int top = (int)ceil(fmax(y - edge, 0)), bottom = (int)floor(fmin(y + edge, im->height - 1));
    vf lane, weight = {0}, sum_y = {0}, sum_x = {0}, sum[channels];
    for (int i = 0; i < LANES; i++) lane[i] = i;
    float high[channels], low[channels];
    in_two_parts(point, channels, high, low);
    for (int c = 0; c < channels; c++) sum[c] = (vf){0};
    for (int row = top; row <= bottom; row++) {
        const float dy = row - y, dy2 = dy * dy, half = sqrtf(fmaxf(limit - dy2, 0)) + 1e-3f * edge;
        const int left = (int)ceil(fmax(x - half, 0)), right = (int)floor(fmin(x + half, im->width - 1));
        vf here = {0};
        for (int column = left; column <= right; column += LANES) {
            const float *at = im->planes + (int64_t)row * im->stride + column;
            const vf dx = lane + (float)(column - x), d_space = dx * dx + dy2;
            vf d_range = {0}, d[channels];
            for (int c = 0; c < channels; c++) {
                d[c] = *(const vf_loose *)(at + (int64_t)c * im->height * im->stride) - high[c];
                d_range += d[c] * d[c];
            }
            const vf joint = d_space * scale + d_range;
            const vi inside = ball ? (vi)(joint <= reach2) : (vi)((d_space <= limit) & (d_range <= reach2));
            const vf w = where(inside, exponential(joint * -0.5f)); /* what lies outside may overflow, and is struck out */
            here += w;
            sum_x += w * dx;
            for (int c = 0; c < channels; c++) sum[c] += w * d[c];
        }
        weight += here;
        sum_y += here * dy;
    }
    const double n = total(weight);
    if (n <= 0) return 0;
    step[0] = total(sum_y) / n;
    step[1] = total(sum_x) / n;
    for (int c = 0; c < channels; c++) step[2 + c] = total(sum[c]) / n - low[c];
    return n;
}

#define MOST 8 /* coordinates of a point that is remembered */
#define MODES 64
#define PASSED 256
#define WAY 128

/* Where the climbs of one piece have been, in bandwidths. */
struct memory {
    int modes, passed, next;
    double mode[MODES][MOST], shift2[MODES];
    double point[PASSED][MOST], step[PASSED][MOST];
    int leads[PASSED]; /* the mode's number */
};

/* The mode at which a climb at `z` with the next step `f` will end, or -1. */
INLINE int known_end(const struct memory *m, const int n, const double *z, const double *f, double shift2, int early) {
    for (int i = 0; i < m->modes; i++) {
        double d2 = 0, ahead = 0;
        for (int k = 0; k < n; k++) {
            const double d = m->mode[i][k] - z[k];
            d2 += d * d, ahead += d * f[k];
        }
        if (d2 <= 0.01 && ahead >= 0) return i;
    }
    for (int i = 0; i < m->passed && !early; i++) {
        double d2 = 0, along = 0, length2 = 0;
        for (int k = 0; k < n; k++) {
            const double d = m->point[i][k] - z[k];
            d2 += d * d;
        }
        if (d2 > 0.0025) continue;
        for (int k = 0; k < n; k++) along += m->step[i][k] * f[k], length2 += m->step[i][k] * m->step[i][k];
        if (along >= 0.9 * sqrt(shift2 * length2)) return m->leads[i];
    }
    return -1;
}

INLINE int climb_normal(const struct image *im, const int channels, const int ball, struct memory *m, double *point,
                        float *moved) {
    const int n = 2 + channels;
    double way[WAY][MOST], steps[WAY][MOST], z[MOST], f[MOST], step[MOST], last_z[MOST] = {0}, last_f[MOST] = {0};
    double mean[MOST] = {0}, height = 0;
    int iteration = 0, length = 0, before = 0, leapt = 0, end = -1;
    while (iteration < im->max_iterations) {
        const double weight = step_to_mean(im, channels, ball, point, step);
        iteration++;
        if (leapt && weight < height * (1 - 1e-6)) { /* back to the mean from which it leapt too far */
            for (int k = 0; k < n; k++) point[k] = mean[k];
            leapt = before = 0;
            continue;
        }
        *moved = 0;
        if (weight <= 0) break;
        height = weight;
        double shift2 = 0;
        for (int k = 0; k < n; k++) {
            const double unit = k < 2 ? im->radius : 1;
            z[k] = point[k] / unit, f[k] = step[k] / unit, mean[k] = point[k] + step[k];
            shift2 += f[k] * f[k];
        }
        *moved = shift2;
        end = known_end(m, n, z, f, shift2, iteration < 3);
        if (end >= 0) {
            *moved = m->shift2[end];
            for (int k = 0; k < n; k++) point[k] = m->mode[end][k] * (k < 2 ? im->radius : 1);
            break;
        }
        if (iteration >= 3 && length < WAY) {
            for (int k = 0; k < n; k++) way[length][k] = z[k], steps[length][k] = f[k];
            length++;
        }
        double leap[MOST] = {0}, up = 0, down = 0, along = 0, leap2 = 0;
        if (before && shift2 <= 0.09) {
            for (int k = 0; k < n; k++) up += (f[k] - last_f[k]) * f[k], down += (f[k] - last_f[k]) * (f[k] - last_f[k]);
            const double g = down > 0 ? up / down : 0;
            for (int k = 0; k < n; k++) {
                leap[k] = f[k] - g * (z[k] - last_z[k] + f[k] - last_f[k]);
                along += leap[k] * f[k], leap2 += leap[k] * leap[k];
            }
        }
        leapt = along > 0;
        const double bound = fmin(0.5, 100 * sqrt(shift2)), share = leap2 > bound * bound ? bound / sqrt(leap2) : 1;
        for (int k = 0; k < n; k++) {
            point[k] = leapt ? point[k] + share * leap[k] * (k < 2 ? im->radius : 1) : mean[k];
            last_z[k] = z[k], last_f[k] = f[k];
        }
        before = 1;
        if (shift2 <= 1e-4 * im->tolerance * im->tolerance) {
            if (m->modes == MODES) m->modes = m->passed = m->next = 0;
            end = m->modes++;
            m->shift2[end] = shift2;
            for (int k = 0; k < n; k++) m->mode[end][k] = point[k] / (k < 2 ? im->radius : 1);
            break;
        }
    }
    for (int i = 0; end >= 0 && i < length; i++) {
        for (int k = 0; k < n; k++) m->point[m->next][k] = way[i][k], m->step[m->next][k] = steps[i][k];
        m->leads[m->next] = end;
        m->next = (m->next + 1) % PASSED;
        if (m->passed < PASSED) m->passed++;
    }
    return iteration;
}

#define ROWS(name, CHANNELS, BALL, NORMAL)                                                                   \
    CLONES static void name(const struct image *im, const uint8_t *valid, int first, int last, float *modes, \
                            int32_t *iterations, float *moved) {                                             \
        const int64_t area = (int64_t)im->height * im->width;                                                \
        double point[2 + (CHANNELS)];                                                                         \
        for (int64_t i = (int64_t)first * im->width; i < (int64_t)last * im->width; i++) {                   \
            if (!valid[i]) continue;                                                                         \
            const int row = i / im->width, column = i % im->width;                                           \
            point[0] = row, point[1] = column;                                                               \
            for (int c = 0; c < (CHANNELS); c++)                                                             \
                point[2 + c] = im->planes[((int64_t)c * im->height + row) * im->stride + column];            \
            iterations[i] = climb(im, CHANNELS, BALL, NORMAL, point, moved + i);                             \
            for (int c = 0; c < 2 + (CHANNELS); c++) modes[c * area + i] = point[c];                         \
        }                                                                                                    \
    }
ROWS(rows_3_product, 3, 0, 0)
ROWS(rows_3_ball, 3, 1, 0)
ROWS(rows_1_product, 1, 0, 0)
ROWS(rows_any, im->channels, im->ball, im->normal)

#define FAST_ROWS(name, CHANNELS)                                                                            \
    CLONES static void name(const struct image *im, const uint8_t *valid, int first, int last, float *modes, \
                            int32_t *iterations, float *moved) {                                             \
        const int64_t area = (int64_t)im->height * im->width;                                                \
        struct memory memory;                                                                                \
        double point[MOST];                                                                                  \
        memory.modes = memory.passed = memory.next = 0;                                                      \
        for (int64_t i = (int64_t)first * im->width; i < (int64_t)last * im->width; i++) {                   \
            if (!valid[i]) continue;                                                                         \
            const int row = i / im->width, column = i % im->width;                                           \
            point[0] = row, point[1] = column;                                                               \
            for (int c = 0; c < (CHANNELS); c++)                                                             \
                point[2 + c] = im->planes[((int64_t)c * im->height + row) * im->stride + column];            \
            iterations[i] = im->ball ? climb_normal(im, CHANNELS, 1, &memory, point, moved + i)              \
                                     : climb_normal(im, CHANNELS, 0, &memory, point, moved + i);             \
            for (int c = 0; c < 2 + (CHANNELS); c++) modes[c * area + i] = point[c];                         \
        }                                                                                                    \
    }
FAST_ROWS(fast_3, 3)
FAST_ROWS(fast_any, im->channels)

/* `normal`: 0 flat, 1 normal by plain steps, 2 normal by fewer */
void cvi_climb_rows(const float *planes, const uint8_t *valid, int channels, int height, int width, int stride,
                    float radius, float reach, int ball, int normal, float tolerance, int max_iterations,
                    int first, int last, float *modes, int32_t *iterations, float *moved) {
    const struct image im = {planes, channels, height, width, stride, radius, reach, tolerance, ball, normal, max_iterations};
    void (*rows)(const struct image *, const uint8_t *, int, int, float *, int32_t *, float *) = rows_any;
    if (!normal && channels == 3) rows = ball ? rows_3_ball : rows_3_product;
    if (!normal && channels == 1 && !ball) rows = rows_1_product;
    if (normal == 2 && channels + 2 <= MOST) rows = channels == 3 ? fast_3 : fast_any;
    rows(&im, valid, first, last, modes, iterations, moved);
}

typedef double vd __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));
typedef double vd_loose __attribute__((vector_size(32), aligned(8)));

struct tree {
    const double *low, *high, *sum; /* (nodes, padded): each node's box and the weighted sum of its points */
    const double *mass;             /* (nodes): their weight */
    const int32_t *block;           /* (nodes, 2): a leaf's range of blocks */
    const double *points;           /* (blocks, dimensions, 4); a padding point lies at 1e150 */
    const double *weights;          /* (blocks, 4) */
    int inner, dimensions, padded;
};

INLINE double total4(vd v) { return (v[0] + v[2]) + (v[1] + v[3]); }

/* Add the points of one leaf that lie within the window to `sum` and return their weight. */
INLINE double add_leaf(const struct tree *t, int node, const double *at, double radius2, double *sum) {
    vd mass = {0};
    for (int b = t->block[2 * node]; b < t->block[2 * node + 1]; b++) {
        const vd_loose *p = (const vd_loose *)(t->points + (int64_t)b * t->dimensions * 4);
        vd d2 = {0};
        vl inside = {0};
        for (int d = 0; d < t->dimensions;) {
            for (int stop = d + 8 < t->dimensions ? d + 8 : t->dimensions; d < stop; d++) {
                vd difference = p[d] - at[d];
                d2 += difference * difference;
            }
            inside = d2 <= radius2;
            if (!(inside[0] | inside[1] | inside[2] | inside[3])) break;
        }
        if (!(inside[0] | inside[1] | inside[2] | inside[3])) continue;
        vd weight = (vd)((vl) * (const vd_loose *)(t->weights + (int64_t)b * 4) & inside);
        mass += weight;
        for (int d = 0; d < t->dimensions; d++) sum[d] += total4((vd)((vl)p[d] & inside) * weight);
    }
    return total4(mass);
}

/* The weight of the points within the window around `at`, and their weighted sum. */
INLINE double window_sum(const struct tree *t, const double *at, double radius2, double *sum) {
    int stack[64], depth = 0;
    double mass = 0;
    for (int d = 0; d < t->padded; d++) sum[d] = 0;
    stack[depth++] = 0;
    while (depth) {
        const int node = stack[--depth];
        const int64_t offset = (int64_t)node * t->padded;
        vd nearest = {0}, farthest = {0};
        for (int d = 0; d < t->padded; d += 4) {
            vd q = *(const vd_loose *)(at + d);
            vd below = *(const vd_loose *)(t->low + offset + d) - q, above = q - *(const vd_loose *)(t->high + offset + d);
            vd gap = (vd)((vl)below & (below > 0)) + (vd)((vl)above & (above > 0));
            vl lower = below < above; /* the farther face is the one on the other side */
            vd reach = (vd)(((vl)below & lower) | ((vl)above & ~lower));
            nearest += gap * gap;
            farthest += reach * reach;
        }
        if (total4(nearest) > radius2 * (1 + 1e-12)) continue;
        if (total4(farthest) <= radius2 * (1 - 1e-12)) {
            for (int d = 0; d < t->padded; d++) sum[d] += t->sum[offset + d];
            mass += t->mass[node];
        } else if (node >= t->inner) {
            mass += add_leaf(t, node, at, radius2, sum);
        } else {
            stack[depth++] = 2 * node + 2;
            stack[depth++] = 2 * node + 1;
        }
    }
    return mass;
}

/* Climb from one seed; `at` moves to its end. */
INLINE void climb_tree(const struct tree *t, double radius, double tolerance, int max_iterations, double *at, double *mass,
                       int32_t *iterations, double *moved) {
    double sum[t->padded], shift2 = 0;
    int iteration = 0;
    while (iteration < max_iterations) {
        iteration++;
        const double n = window_sum(t, at, radius * radius, sum);
        shift2 = 0;
        if (iteration == 1 || n > 0) *mass = n;
        if (n <= 0) break;
        for (int d = 0; d < t->dimensions; d++) {
            const double mean = sum[d] / n, step = mean - at[d];
            at[d] = mean;
            shift2 += step * step;
        }
        if (shift2 <= tolerance * tolerance) break;
    }
    *iterations = iteration;
    *moved = sqrt(shift2);
}

#define PIECE 256 /* climbs of one call, among which equal windows are found */
#define TOGETHER 8

struct cloud {
    const float *screen; /* (blocks, padded, LANES): the points in single precision; padding at 1e15 */
    const double *rows;  /* (points, padded) */
    const double *weights;
    int points, dimensions, padded;
    float margin; /* bound on the error of a squared distance in single precision near the window's edge, over radius² */
};

/* The climbs of one piece: where they are and what their windows hold. */
struct piece {
    double *at, *sum; /* (PIECE, padded) */
    double mass[PIECE];
    int64_t count[PIECE];
    uint64_t *members; /* (PIECE + TOGETHER, words): one bit for each point, eight blocks to a word */
    int32_t *changes;  /* (points) */
    double *total;     /* (padded + 1): the weighted sum of all points, and their weight */
    int64_t words;
};

/* One bit for each lane of a mask. */
INLINE int bits(vi mask) {
    const vi bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const vl pairs = (vl)(mask & bit);
    const int64_t all = (pairs[0] | pairs[1]) | (pairs[2] | pairs[3]);
    return (all | all >> 32) & 255;
}

/* Those of eight doubtful points, given as bits, that lie within the window in double precision. */
static int decide_points(const struct cloud *p, const double *at, double radius2, int first, int doubtful) {
    int inside = 0;
    for (int i = 0; i < LANES; i++) {
        if (!(doubtful >> i & 1)) continue;
        double exact = 0;
        for (int d = 0; d < p->dimensions; d++) {
            const double difference = p->rows[(int64_t)(first + i) * p->padded + d] - at[d];
            exact += difference * difference;
        }
        inside |= (exact <= radius2) << i;
    }
    return inside;
}

/* Add to 4 * `vectors` coordinates of a sum the points that entered (2 i + 1) and take off those that left (2 i). */
INLINE void add_changes(const struct cloud *p, const int32_t *changes, int count, int d, const int vectors, double *sum) {
    vd s[4];
    for (int v = 0; v < vectors; v++) s[v] = *(const vd_loose *)(sum + d + 4 * v);
    for (int c = 0; c < count; c++) {
        const int i = changes[c] >> 1;
        const double w = changes[c] & 1 ? p->weights[i] : -p->weights[i];
        const vd_loose *row = (const vd_loose *)(p->rows + (int64_t)i * p->padded + d);
        for (int v = 0; v < vectors; v++) s[v] += w * row[v];
    }
    for (int v = 0; v < vectors; v++) *(vd_loose *)(sum + d + 4 * v) = s[v];
}

/* Bring the sum of climb `i` from its old members to the new ones: by the points that changed, or afresh from the members,
   or from all points less those outside, whichever are fewest. */
INLINE void add_up(const struct cloud *p, struct piece *w, int i, const uint64_t *now) {
    uint64_t *before = w->members + i * w->words;
    double *sum = w->sum + (int64_t)i * p->padded;
    int differing = 0, inside = 0, count = 0;
    for (int64_t k = 0; k < w->words; k++) {
        differing += __builtin_popcountll(now[k] ^ before[k]);
        inside += __builtin_popcountll(now[k]);
    }
    const int fresh = inside < differing, less = p->points - inside < (fresh ? inside : differing);
    if (less || fresh) {
        for (int d = 0; d < p->padded; d++) sum[d] = less ? w->total[d] : 0;
        w->mass[i] = less ? w->total[p->padded] : 0;
    }
    for (int64_t k = 0; k < w->words; k++) {
        const uint64_t all = 64 * (k + 1) <= p->points ? ~0ull : (1ull << p->points % 64) - 1;
        for (uint64_t change = less ? ~now[k] & all : fresh ? now[k] : now[k] ^ before[k]; change; change &= change - 1) {
            const int bit = __builtin_ctzll(change);
            w->changes[count++] = (int)(64 * k + bit) << 1 | (int)(now[k] >> bit & 1);
        }
        before[k] = now[k];
    }
    int d = 0;
    for (; d + 16 <= p->padded; d += 16) add_changes(p, w->changes, count, d, 4, sum);
    for (; d < p->padded; d += 4) add_changes(p, w->changes, count, d, 1, sum);
    for (int c = 0; c < count; c++) {
        const double weight = p->weights[w->changes[c] >> 1];
        w->mass[i] += w->changes[c] & 1 ? weight : -weight;
    }
    w->count[i] = inside;
}

/* Bring members and sums of `many` climbs up to date with the windows around them. */
INLINE void follow(const struct cloud *p, double radius, const int many, const int *which, struct piece *w) {
    const double radius2 = radius * radius;
    const float surely = radius2 * (1 - p->margin), maybe = radius2 * (1 + p->margin);
    float query[p->padded][TOGETHER];
    uint64_t *fresh = w->members + PIECE * w->words;
    memset(fresh, 0, many * w->words * sizeof *fresh);
    for (int g = 0; g < many; g++)
        for (int d = 0; d < p->padded; d++) query[d][g] = w->at[(int64_t)which[g] * p->padded + d];
    for (int first = 0, b = 0; first < p->points; first += LANES, b++) {
        const vf_loose *block = (const vf_loose *)(p->screen + (int64_t)b * p->padded * LANES);
        vf d2[TOGETHER];
        vi near, doubt = {0};
        for (int g = 0; g < many; g++) d2[g] = (vf){0};
        int d = 0, stop = p->padded > 16 ? 8 : p->padded;
        do {
            for (; d < stop; d += 4)
                for (int k = d; k < d + 4; k++)
                    for (int g = 0; g < many; g++) {
                        const vf difference = block[k] - query[k][g];
                        d2[g] += difference * difference;
                    }
            near = d2[0] <= maybe;
            for (int g = 1; g < many; g++) near |= d2[g] <= maybe;
            stop = p->padded;
        } while (d < stop && any(near));
        for (int g = 0; g < many; g++) doubt |= (d2[g] <= maybe) ^ (d2[g] <= surely);
        const int real = p->points - first < LANES ? (1 << (p->points - first)) - 1 : 255;
        const int careful = any(doubt);
        for (int g = 0; g < many; g++) {
            int now = bits(d2[g] <= maybe) & real;
            if (careful) {
                const int sure = bits(d2[g] <= surely) & real;
                now = sure | decide_points(p, w->at + (int64_t)which[g] * p->padded, radius2, first, now & ~sure);
            }
            fresh[g * w->words + b / 8] |= (uint64_t)now << 8 * (b % 8);
        }
    }
    for (int g = 0; g < many; g++) add_up(p, w, which[g], fresh + g * w->words);
}

/* The first of `count` climbs whose window has the same members as climb `i`, or `i`. */
INLINE int same_window(const struct piece *w, const int *climbs, int count, int i, uint64_t *prints) {
    const uint64_t *mine = w->members + i * w->words;
    prints[i] = 0;
    for (int64_t k = 0; k < w->words; k++) {
        prints[i] = (prints[i] ^ mine[k]) * 0x9E3779B97F4A7C15u;
        prints[i] ^= prints[i] >> 32;
    }
    for (int c = 0; c < count; c++)
        if (prints[climbs[c]] == prints[i] && !memcmp(w->members + climbs[c] * w->words, mine, w->words * sizeof *mine))
            return climbs[c];
    return i;
}

INLINE void climb_piece(const struct cloud *p, double radius, double tolerance, int max_iterations, int climbs,
                        struct piece *w, double *mass, int32_t *iterations, double *moved) {
    int active[PIECE], owner[PIECE], left = climbs;
    uint64_t prints[PIECE];
    double total[p->padded + 1];
    for (int d = 0; d <= p->padded; d++) total[d] = 0;
    for (int64_t i = 0; i < p->points; i++) {
        for (int d = 0; d < p->padded; d++) total[d] += p->weights[i] * p->rows[i * p->padded + d];
        total[p->padded] += p->weights[i];
    }
    w->total = total;
    memset(w->members, 0, climbs * w->words * sizeof *w->members);
    memset(w->sum, 0, (int64_t)climbs * p->padded * sizeof *w->sum);
    for (int i = 0; i < climbs; i++) active[i] = owner[i] = i, w->mass[i] = 0, w->count[i] = 0;
    for (int iteration = 1; left && iteration <= max_iterations; iteration++) {
        int done = 0, kept = 0;
        for (; done + TOGETHER <= left; done += TOGETHER) follow(p, radius, TOGETHER, active + done, w);
        for (; done < left; done++) follow(p, radius, 1, active + done, w);
        for (int a = 0; a < left; a++) {
            const int i = active[a];
            double *at = w->at + (int64_t)i * p->padded, *sum = w->sum + (int64_t)i * p->padded, shift2 = 0;
            const int empty = w->count[i] <= 0;
            if (iteration == 1 || !empty) mass[i] = empty ? 0 : w->mass[i];
            for (int d = 0; d < p->dimensions && !empty; d++) {
                const double mean = sum[d] / w->mass[i], step = mean - at[d];
                at[d] = mean;
                shift2 += step * step;
            }
            iterations[i] = iteration;
            moved[i] = sqrt(shift2);
            if (shift2 <= tolerance * tolerance || iteration == max_iterations) continue;
            owner[i] = same_window(w, active, kept, i, prints);
            if (owner[i] == i) active[kept++] = i;
        }
        left = kept;
    }
    for (int i = climbs - 1; i >= 0; i--) {
        int last = i;
        while (owner[last] != last) last = owner[last];
        memcpy(w->at + (int64_t)i * p->padded, w->at + (int64_t)last * p->padded, p->padded * sizeof *w->at);
        mass[i] = mass[last], iterations[i] = iterations[last], moved[i] = moved[last];
    }
}

CLONES static void climb_in_tree(const struct tree *t, double radius, double tolerance, int max_iterations, int64_t first,
                                 int64_t last, double *seeds, double *mass, int32_t *iterations, double *moved) {
    for (int64_t i = first; i < last; i++)
        climb_tree(t, radius, tolerance, max_iterations, seeds + i * t->padded, mass + i, iterations + i, moved + i);
}

CLONES static void climb_in_cloud(const struct cloud *p, double radius, double tolerance, int max_iterations, int climbs,
                                  struct piece *w, double *mass, int32_t *iterations, double *moved) {
    climb_piece(p, radius, tolerance, max_iterations, climbs, w, mass, iterations, moved);
}

void cvi_climb_tree(const double *low, const double *high, const double *sum, const double *mass_of, const int32_t *block,
                    const double *points, const double *weights, int inner, int dimensions, int padded, double radius,
                    double tolerance, int max_iterations, int64_t first, int64_t last, double *seeds, double *mass,
                    int32_t *iterations, double *moved) {
    const struct tree t = {low, high, sum, mass_of, block, points, weights, inner, dimensions, padded};
    climb_in_tree(&t, radius, tolerance, max_iterations, first, last, seeds, mass, iterations, moved);
}

/* At most PIECE climbs; `members`, `changes` and `sum` are room for this call alone. */
void cvi_climb_cloud(const float *screen, const double *rows, const double *weights, int points, int dimensions, int padded,
                     float margin, double radius, double tolerance, int max_iterations, int64_t first, int64_t last,
                     double *seeds, double *mass, int32_t *iterations, double *moved, uint64_t *members, int32_t *changes,
                     double *sum) {
    const struct cloud p = {screen, rows, weights, points, dimensions, padded, margin};
    struct piece w = {.at = seeds + first * padded, .sum = sum, .members = members, .changes = changes, .words = (points + 63) / 64};
    climb_in_cloud(&p, radius, tolerance, max_iterations, last - first, &w, mass + first, iterations + first, moved + first);
}
