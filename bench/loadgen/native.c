/* native.c - frames of the native protocol and the MessagePack in them, see native.h. */
#include "native.h"

#include <string.h>

/* --- writing --- */

void frame_head(unsigned char head[FRAME_HEAD], enum frame_type type, size_t length)
{
    for (int i = 0; i < 4; i++)
        head[i] = (unsigned char)(length >> (24 - 8 * i));
    head[4] = (unsigned char)type;
}

size_t frame_length(const unsigned char head[FRAME_HEAD])
{
    return (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
}

void frame_begin(struct frame *f, enum frame_type type)
{
    frame_head(f->octets, type, 0);
    f->length = FRAME_HEAD;
}

void frame_end(struct frame *f)
{
    frame_head(f->octets, f->octets[4], f->length - FRAME_HEAD);
}

static void octet(struct frame *f, unsigned value)
{
    f->octets[f->length++] = (unsigned char)value;
}

static void big_endian(struct frame *f, uint64_t value, int octets)
{
    while (octets--)
        octet(f, (unsigned)(value >> (8 * octets)) & 0xff);
}

void frame_array(struct frame *f, unsigned count)
{
    octet(f, 0x90 | count);
}

void frame_uint(struct frame *f, uint64_t value)
{
    if (value < 0x80) {
        octet(f, (unsigned)value);
        return;
    }
    int power = value > 0xffffffff ? 3 : value > 0xffff ? 2 : value > 0xff ? 1 : 0;
    octet(f, 0xcc + (unsigned)power);
    big_endian(f, value, 1 << power);
}

void frame_text(struct frame *f, const char *text)
{
    size_t length = strlen(text);
    octet(f, 0xa0 | (unsigned)length);
    memcpy(f->octets + f->length, text, length);
    f->length += length;
}

void frame_bool(struct frame *f, bool value)
{
    octet(f, value ? 0xc3 : 0xc2);
}

/* --- reading --- */

static uint64_t octets_of(struct reader *r, int count)
{
    uint64_t value = 0;
    if (r->end - r->at < count) {
        r->bad = true;
        return 0;
    }
    while (count--)
        value = value << 8 | *r->at++;
    return value;
}

int64_t read_int(struct reader *r)
{
    unsigned form = (unsigned)octets_of(r, 1);
    if (form < 0x80)
        return form;
    if (form >= 0xe0)
        return (int8_t)form;
    switch (form) {
    case 0xcc: case 0xcd: case 0xce: case 0xcf: return (int64_t)octets_of(r, 1 << (form - 0xcc));
    case 0xd0: return (int8_t)octets_of(r, 1);
    case 0xd1: return (int16_t)octets_of(r, 2);
    case 0xd2: return (int32_t)octets_of(r, 4);
    case 0xd3: return (int64_t)octets_of(r, 8);
    default: r->bad = true; return 0;
    }
}

uint64_t read_uint(struct reader *r)
{
    int64_t value = read_int(r);
    r->bad |= value < 0;
    return (uint64_t)value;
}

unsigned read_array(struct reader *r)
{
    unsigned form = (unsigned)octets_of(r, 1);
    if (form >> 4 == 9)
        return form & 15;
    if (form == 0xdc)
        return (unsigned)octets_of(r, 2);
    r->bad = true;
    return 0;
}
