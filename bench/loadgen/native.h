/* native.h - as much of the native protocol (docs/protocol.md) as a client of the benchmark speaks.
 *
 * Connections come authenticated from whoever starts the program; here are frames, and the MessagePack in them.
 */
#ifndef NATIVE_H
#define NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FRAME_HEAD = 5, FRAME_ROOM = FRAME_HEAD + 65536 };

enum frame_type {
    F_ERROR = 0x06, F_OPEN = 0x10, F_OPENED, F_FAILED, F_DATA, F_EOF, F_ABORTED, F_END, F_ENDED,
    F_PING = 0x20, F_PONG, F_DEMAND = 0x24, F_GRANT = 0x28,
};

/* A frame that is being written. The payload of a record is an array, so most begin with `frame_array`. */
struct frame { unsigned char octets[512]; size_t length; };
void frame_begin(struct frame *f, enum frame_type type);
void frame_array(struct frame *f, unsigned count);           /* of at most 15 */
void frame_uint(struct frame *f, uint64_t value);            /* in its shortest form */
void frame_text(struct frame *f, const char *text);          /* of at most 31 octets */
void frame_bool(struct frame *f, bool value);
void frame_end(struct frame *f);

void frame_head(unsigned char head[FRAME_HEAD], enum frame_type type, size_t length);
size_t frame_length(const unsigned char head[FRAME_HEAD]);   /* of the payload */

/* What is being read of a payload; `bad` once it is not what was asked for. */
struct reader { const unsigned char *at, *end; bool bad; };
uint64_t read_uint(struct reader *r);
int64_t read_int(struct reader *r);
unsigned read_array(struct reader *r);

#endif
