/* samples.c - what was measured one by one, kept to be sorted at the end. */
#include "loadgen.h"

#include <stdlib.h>

void sample_add(struct samples *s, double microseconds)
{
    if (s->count == s->room) {
        s->room = s->room ? s->room * 2 : 65536;
        s->value = realloc(s->value, s->room * sizeof *s->value);
        if (!s->value)
            die("memory");
    }
    s->value[s->count++] = (float)microseconds;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

double sample_at(struct samples *s, double fraction)
{
    if (!s->count)
        return 0;
    qsort(s->value, s->count, sizeof *s->value, by_value);
    return s->value[(size_t)(fraction * (double)(s->count - 1) + 0.5)];
}
