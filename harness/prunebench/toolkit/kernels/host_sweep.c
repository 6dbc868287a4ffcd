/* SparseGPT's sweep over a slab of columns on a host; `host_sweep.py` describes, compiles and calls it.

   Rows of W are independent, so ROWS of them go through a slab together. All matrices are stored [columns, outputs]: those rows
   lie side by side and fill VECTORS registers of LANES numbers, and sums for BLOCK columns stay in registers, be there 32 or 16 of
   them. A sum starts at zero and takes the columns in their order, by fused multiply-adds. So its bits depend on where slabs begin,
   and neither on the width of registers nor on the number of threads. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define VECTORS 4
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define VECTORS 2
#elif defined(__ARM_FEATURE_FMA)
#define LANES 4
#define VECTORS 4
#else
#error "the processor has no fused multiply-add"
#endif

#define ROWS (LANES * VECTORS)
#define BLOCK 6
#define WIDEST 256 /* columns of a slab */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES))); /* of comparisons: all set where true */

/* A column's entries in ROWS rows. */
typedef struct { floats at[VECTORS]; } numbers;
typedef struct { bits at[VECTORS]; } choices;

/* Some columns, from and to a matrix with `step` outputs. Where there are fewer rows than ROWS, the others are zero. */
static void load(numbers *to, const float *from, int64_t columns, int64_t step, int64_t rows)
{
    for (int64_t c = 0; c < columns; c++) {
        if (rows < ROWS)
            to[c] = (numbers){0};
        memcpy(&to[c], from + c * step, sizeof(float) * (size_t)rows);
    }
}

static void store(float *to, const numbers *from, int64_t columns, int64_t step, int64_t rows)
{
    for (int64_t c = 0; c < columns; c++)
        memcpy(to + c * step, &from[c], sizeof(float) * (size_t)rows);
}

static choices load_mask(const uint8_t *from, int64_t step, int64_t rows)
{
    int32_t all[ROWS] = {0};
    choices found;
    for (int64_t r = 0; r < rows; r++)
        all[r] = from[r * step] ? -1 : 0;
    memcpy(&found, all, sizeof found);
    return found;
}

static void store_mask(uint8_t *to, const choices *from, int64_t rows)
{
    int32_t all[ROWS];
    memcpy(all, from, sizeof all);
    for (int64_t r = 0; r < rows; r++)
        to[r] = all[r] != 0;
}

/* Take from `count` columns the errors of `deep` columns before them: of error k the share[k * step + c]. */
static inline __attribute__((always_inline)) void
take(numbers *from, const int count, const float *share, int64_t step, const numbers *errors, int64_t deep)
{
    numbers sum[BLOCK] = {0};
    for (int64_t k = 0; k < deep; k++)
        for (int c = 0; c < count; c++)
            for (int v = 0; v < VECTORS; v++)
                sum[c].at[v] += errors[k].at[v] * share[k * step + c];
    for (int c = 0; c < count; c++)
        for (int v = 0; v < VECTORS; v++)
            from[c].at[v] -= sum[c].at[v];
}

/* The same for any number of columns: sums stay in registers only where the compiler knows how many there are. */
static void take_from_all(numbers *from, int64_t count, const float *share, int64_t step, const numbers *errors, int64_t deep)
{
    for (; count >= BLOCK; count -= BLOCK, from += BLOCK, share += BLOCK)
        take(from, BLOCK, share, step, errors, deep);
    for (; count >= 4; count -= 4, from += 4, share += 4)
        take(from, 4, share, step, errors, deep);
    for (; count; count--, from++, share++)
        take(from, 1, share, step, errors, deep);
}

/* In each row `keeps` of `of` columns stay, those of the highest scores (w/U_jj)²; of equal ones the later. Columns that are gone
   already go first, and stay away. */
static void choose(choices *stays, const numbers *weight, const float *inverse, int64_t keeps, int64_t of, const choices *gone)
{
    numbers score[WIDEST];
    const floats least = (floats){0} - 1;
    for (int64_t c = 0; c < of; c++)
        for (int v = 0; v < VECTORS; v++) {
            floats root = weight[c].at[v] * inverse[c], found = root * root;
            if (gone)
                found = (floats)(((bits)found & ~gone[c].at[v]) | ((bits)least & gone[c].at[v]));
            score[c].at[v] = found;
        }
    for (int64_t c = 0; c < of; c++)
        for (int v = 0; v < VECTORS; v++) {
            bits rank = {0};
            for (int64_t other = 0; other < c; other++)
                rank += 1 + (score[c].at[v] < score[other].at[v]);
            for (int64_t other = c + 1; other < of; other++)
                rank -= score[other].at[v] < score[c].at[v];
            stays[c].at[v] = rank >= (int32_t)(of - keeps);
            if (gone)
                stays[c].at[v] &= ~gone[c].at[v];
        }
}

/* The slab's rows from `first` to `last`: see `sweep_slab` in host_sweep.py. `upper` is [columns, columns]; `removed` may be null. */
void prunebench_sweep(
    float *work, uint8_t *keep, float *errors, int64_t outputs, int64_t first, int64_t last, int64_t columns, const float *upper,
    const float *inverse, int64_t keeps, int64_t of, const uint8_t *removed, int64_t removed_row, int64_t removed_column)
{
    numbers weight[WIDEST], error[WIDEST];
    choices stays[WIDEST], gone[WIDEST];
    const floats one = (floats){0} + 1;
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t rows = last - row < ROWS ? last - row : ROWS;
        load(weight, work + row, columns, outputs, rows);
        for (int64_t at = 0; at < columns; at += of ? of : BLOCK) {
            const int64_t end = of ? at + of : at + BLOCK < columns ? at + BLOCK : columns;
            take_from_all(weight + at, end - at, upper + at, columns, error, at);
            if (of) {
                for (int64_t c = at; removed && c < end; c++)
                    gone[c] = load_mask(removed + row * removed_row + c * removed_column, removed_row, rows);
                choose(stays + at, weight + at, inverse + at, keeps, of, removed ? gone + at : 0);
                for (int64_t c = at; c < end; c++)
                    store_mask(keep + c * outputs + row, &stays[c], rows);
            } else
                for (int64_t c = at; c < end; c++)
                    stays[c] = load_mask(keep + c * outputs + row, 1, rows);
            for (int64_t c = at; c < end; c++) {
                take(weight + c, 1, upper + at * columns + c, columns, error + at, c - at);
                for (int v = 0; v < VECTORS; v++) { /* by products, so that a NaN stays one */
                    floats scale = (floats)((bits)((floats){0} + inverse[c]) & ~stays[c].at[v]);
                    error[c].at[v] = weight[c].at[v] * scale;
                    weight[c].at[v] *= (floats)((bits)one & stays[c].at[v]);
                }
            }
        }
        store(work + row, weight, columns, outputs, rows);
        store(errors + row, error, columns, outputs, rows);
    }
}

/* Lay out `upper` [deep, later], stored by rows or by columns, for prunebench_correct: BLOCK columns after BLOCK columns. */
void prunebench_pack(float *share, const float *upper, int64_t row, int64_t column, int64_t deep, int64_t later)
{
    for (int64_t c = 0; c < later; c += BLOCK, share += BLOCK * deep) {
        const int64_t count = later - c < BLOCK ? later - c : BLOCK; /* what would fill up the last is not read */
        for (int64_t k = 0; k < deep; k++)
            for (int64_t i = 0; i < count; i++)
                share[k * BLOCK + i] = upper[k * row + (c + i) * column];
    }
}

/* Take from the rows `first` to `last` of `later` columns the errors of the `deep` columns of a slab. */
void prunebench_correct(
    float *work, const float *share, const float *errors, int64_t outputs, int64_t first, int64_t last, int64_t deep, int64_t later)
{
    numbers error[WIDEST], part[BLOCK];
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t rows = last - row < ROWS ? last - row : ROWS;
        load(error, errors + row, deep, outputs, rows);
        for (int64_t c = 0; c < later; c += BLOCK) {
            const int64_t count = later - c < BLOCK ? later - c : BLOCK;
            load(part, work + c * outputs + row, count, outputs, rows);
            take_from_all(part, count, share + c * deep, BLOCK, error, deep);
            store(work + c * outputs + row, part, count, outputs, rows);
        }
    }
}
