/* The hot path of the load generator. `scenarios/client/reader.py` documents its types; without a C compiler its Python
   fallback is used, which passes everything on. This one stores chunks by itself, because a token costs the interpreter
   more than it costs the kernel. tests/test_hot_path.py checks that no byte is lost. Stable ABI of Python 3.11. */

#define _GNU_SOURCE
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define READ_SIZE 65536
#define BATCH 64
#define LONG_NS 300000 /* after so long a round of reading ends: a request may be due */
#define MANY 16 /* ready at once: to look again is cheaper than a turn of the loop */
#define DIGITS 5
#define LINE_END "\r\n"
#define PARTIAL 16384 /* a chunk that is not whole is held up to this size */
#define EVENTS (EPOLLIN | EPOLLRDHUP | EPOLLET)

static int64_t in_ns(struct timespec t) { return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return in_ns(t);
}

/* -- Pattern ------------------------------------------------------------------------------------------------------- */

enum { WORD = 1, DIGIT = 2, VALUE = 4 }; /* what a byte may be where it need not be the same */

static uint8_t may_be[256];

typedef struct {
    Py_ssize_t end; /* of a span of bytes that are alike in this: */
    uint8_t may;    /* 0: each is the same; else any of these */
} Span;

typedef struct {
    char *bytes;
    Py_ssize_t size;
    Span *spans;
} MaskedBytes;

typedef struct {
    MaskedBytes before;
    char *after;
    Py_ssize_t after_size;
} Event;

typedef struct {
    PyObject_HEAD
    MaskedBytes opening;
    Event *events;
    int count;
} Pattern;

#define KINDS 15 /* a Mark has four bits for the kind */

/* Whether `data` is like the first `size` bytes of it. */
static int matches(const MaskedBytes *as, const char *data, Py_ssize_t size) {
    const Span *span = as->spans;
    for (Py_ssize_t at = 0; at < size; at = span++->end) {
        const Py_ssize_t end = span->end < size ? span->end : size;
        if (!span->may) {
            if (memcmp(data + at, as->bytes + at, end - at)) return 0;
        } else {
            for (Py_ssize_t i = at; i < end; i++)
                if (!(may_be[(uint8_t)data[i]] & span->may)) return 0;
        }
    }
    return 1;
}

static void *copy_of(const void *bytes, Py_ssize_t size) {
    void *copy = PyMem_Malloc(size ? size : 1);
    if (copy) memcpy(copy, bytes, size);
    else PyErr_NoMemory();
    return copy;
}

static int MaskedBytes_init(MaskedBytes *self, PyObject *bytes, PyObject *loose) {
    char *same, *kinds;
    Py_ssize_t size, loose_size;
    if (PyBytes_AsStringAndSize(bytes, &same, &size) < 0 || PyBytes_AsStringAndSize(loose, &kinds, &loose_size) < 0)
        return -1;
    if (size != loose_size) {
        PyErr_Format(PyExc_ValueError, "%zd bytes, and %zd that say which may differ", size, loose_size);
        return -1;
    }
    self->bytes = copy_of(same, size);
    self->spans = self->bytes ? PyMem_Malloc((size + 1) * sizeof(Span)) : NULL;
    if (!self->spans) {
        if (self->bytes) PyErr_NoMemory();
        return -1;
    }
    Span *last = self->spans;
    for (Py_ssize_t i = 0; i < size; i++) {
        const uint8_t may = kinds[i] == 'w' ? WORD : kinds[i] == 'd' ? DIGIT : kinds[i] == 'v' ? VALUE : 0;
        if (i && may != last->may) last++;
        *last = (Span){.end = i + 1, .may = may};
    }
    self->size = size;
    return 0;
}

static void MaskedBytes_free(MaskedBytes *self) {
    PyMem_Free(self->bytes);
    PyMem_Free(self->spans);
}

static void Pattern_dealloc(Pattern *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    MaskedBytes_free(&self->opening);
    for (int i = 0; i < self->count; i++) {
        MaskedBytes_free(&self->events[i].before);
        PyMem_Free(self->events[i].after);
    }
    PyMem_Free(self->events);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int Event_init(Event *self, PyObject *tuple) {
    PyObject *before, *loose, *after;
    char *bytes;
    if (!PyTuple_Check(tuple)) {
        PyErr_Format(PyExc_TypeError, "an event is a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "SSS", &before, &loose, &after) ||
        MaskedBytes_init(&self->before, before, loose) < 0 ||
        PyBytes_AsStringAndSize(after, &bytes, &self->after_size) < 0)
        return -1;
    self->after = copy_of(bytes, self->after_size);
    return self->after ? 0 : -1;
}

static PyObject *Pattern_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *opening, *loose, *events;
    if (kwargs && PyDict_Size(kwargs)) return PyErr_Format(PyExc_TypeError, "Pattern() takes no names");
    if (!PyArg_ParseTuple(args, "SSO!", &opening, &loose, &PyTuple_Type, &events)) return NULL;
    const Py_ssize_t count = PyTuple_Size(events);
    if (count > KINDS) return PyErr_Format(PyExc_ValueError, "more than %d kinds of events", KINDS);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Pattern *self = (Pattern *)allocate(type, 0);
    if (!self) return NULL;
    int bad = MaskedBytes_init(&self->opening, opening, loose) < 0;
    if (!bad && !(self->events = PyMem_Calloc(count ? count : 1, sizeof(Event)))) {
        PyErr_NoMemory();
        bad = 1;
    }
    for (; !bad && self->count < count; self->count++)
        bad = Event_init(&self->events[self->count], PyTuple_GetItem(events, self->count)) < 0;
    if (!bad) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static PyType_Slot pattern_slots[] = {
    {Py_tp_doc, "What the answers of a server have in common."},
    {Py_tp_new, Pattern_new},
    {Py_tp_dealloc, Pattern_dealloc},
    {0},
};

static PyType_Spec pattern_spec = {"harness.scenarios.client._reader.Pattern", sizeof(Pattern), 0, Py_TPFLAGS_DEFAULT, pattern_slots};

/* -- ReceiveBuffer ------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t stamp;
    uint32_t length : 28, kind : 4; /* kind 0: content of a chunk; else the text of an event of this kind */
} __attribute__((packed)) Mark;

#define LONGEST ((1u << 28) - 1)

/* One block of memory for each answer: with thousands of streams, every other one would cost a cache miss per token. */
typedef struct {
    PyObject_HEAD
    char *data; /* of each entry a Mark, then its bytes; behind them those of a chunk that is not whole yet */
    uint32_t count, size, partial, room;
    uint32_t chunk_bytes;   /* bytes of contents */
    uint32_t odd;   /* not 0: some text has a quote, a backslash, or what is not printable ASCII */
    uint8_t opening, opening_matched; /* the opening of the answer is still to come; it came */
    uint8_t first;  /* the first event after it is still to come */
    uint8_t inside; /* the last chunk did not end with an event */
    uint8_t line_end_missing;   /* bytes of its line end still missing; forever, if other bytes came instead */
    int64_t last_ns;
} Buffer;

static int Buffer_reserve(Buffer *self, uint64_t size) {
    if (size <= self->room) return 0;
    uint64_t room = self->room ? 2 * (uint64_t)self->room : 512;
    if (room < size) room = size;
    char *grown = room > UINT32_MAX ? NULL : PyMem_Realloc(self->data, room);
    if (!grown) {
        PyErr_NoMemory();
        return -1;
    }
    self->data = grown;
    self->room = (uint32_t)room;
    return 0;
}

static int Buffer_add(Buffer *self, const char *bytes, Py_ssize_t length, int kind, int64_t stamp) {
    const Mark mark = {.stamp = stamp, .length = (uint32_t)length, .kind = kind};
    const uint64_t size = self->size + sizeof mark + (uint64_t)length;
    if (Buffer_reserve(self, size) < 0) return -1;
    memcpy(self->data + self->size, &mark, sizeof mark);
    memcpy(self->data + self->size + sizeof mark, bytes, length);
    if (kind) {
        uint32_t odd = 0;
        for (Py_ssize_t i = 0; i < length; i++)
            odd |= (bytes[i] < ' ') | (bytes[i] > '~') | (bytes[i] == '"') | (bytes[i] == '\\');
        self->odd |= odd;
    } else {
        self->chunk_bytes += (uint32_t)length;
    }
    self->size = (uint32_t)size;
    self->count++;
    return 0;
}

static void Buffer_dealloc(Buffer *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyMem_Free(self->data);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Py_ssize_t Buffer_length(Buffer *self) { return self->count; }

static PyObject *Buffer_take_partial(Buffer *self, PyObject *Py_UNUSED(none)) {
    PyObject *rest = PyBytes_FromStringAndSize(self->data + self->size, self->partial);
    if (rest) self->partial = 0;
    return rest;
}

static PyObject *Buffer_clear(Buffer *self, PyObject *Py_UNUSED(none)) {
    char *rest = NULL;
    if (self->partial) {
        rest = copy_of(self->data + self->size, self->partial);
        if (!rest) return NULL;
    }
    PyMem_Free(self->data);
    self->data = rest;
    self->room = self->partial;
    self->count = self->size = self->chunk_bytes = self->odd = 0;
    Py_RETURN_NONE;
}

static PyObject *Buffer_run(Buffer *self, uint32_t *at, int64_t since, int whole) {
    Mark mark, first;
    uint32_t end = *at, count = 0;
    memcpy(&first, self->data + *at, sizeof first);
    for (; end < self->size; end += (uint32_t)sizeof mark + mark.length, count++) {
        memcpy(&mark, self->data + end, sizeof mark);
        if (mark.kind != first.kind) break;
    }
    PyObject *stamps = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(int64_t));
    PyObject *parts = stamps && (whole || self->odd || !first.kind) ? PyList_New(count) : NULL;
    const int listed = parts != NULL;
    if (!stamps || PyErr_Occurred()) {
        Py_XDECREF(stamps);
        return NULL;
    }
    char *to = PyBytes_AsString(stamps);
    for (uint32_t i = 0; i < count; i++, *at += (uint32_t)sizeof mark + mark.length) {
        memcpy(&mark, self->data + *at, sizeof mark);
        const int64_t stamp = mark.stamp - since;
        memcpy(to + i * sizeof stamp, &stamp, sizeof stamp);
        if (!parts) continue;
        PyObject *part = PyBytes_FromStringAndSize(self->data + *at + sizeof mark, mark.length);
        if (!part || PyList_SetItem(parts, i, part) < 0) Py_CLEAR(parts);
    }
    PyObject *run = listed && !parts ? NULL : Py_BuildValue("iOO", (int)first.kind, stamps, listed ? parts : Py_None);
    Py_DECREF(stamps);
    Py_XDECREF(parts);
    return run;
}

static PyObject *Buffer_runs(Buffer *self, PyObject *args) {
    long long since;
    int whole;
    if (!PyArg_ParseTuple(args, "Lp", &since, &whole)) return NULL;
    PyObject *runs = PyList_New(0);
    for (uint32_t at = 0; runs && at < self->size;) {
        PyObject *run = Buffer_run(self, &at, since, whole);
        if (!run || PyList_Append(runs, run) < 0) Py_CLEAR(runs);
        Py_XDECREF(run);
    }
    return runs;
}

static PyObject *Buffer_opening_matched(Buffer *self, void *Py_UNUSED(closure)) {
    return PyBool_FromLong(self->opening_matched);
}

static PyMethodDef buffer_methods[] = {
    {"runs", (PyCFunction)Buffer_runs, METH_VARARGS, "Everything stored, in runs of one kind: kind, stamps, parts."},
    {"take_partial", (PyCFunction)Buffer_take_partial, METH_NOARGS, "Remove and return the bytes of an incomplete chunk."},
    {"clear", (PyCFunction)Buffer_clear, METH_NOARGS, "Drop everything but an incomplete chunk."},
    {0},
};

static PyMemberDef buffer_members[] = {
    {"last_ns", T_LONGLONG, offsetof(Buffer, last_ns), READONLY, "When something was last stored; 0 for never."},
    {"chunk_bytes", T_UINT, offsetof(Buffer, chunk_bytes), READONLY, "Bytes of whole chunks."},
    {"size", T_UINT, offsetof(Buffer, size), READONLY, "Bytes of everything."},
    {"line_end_missing", T_UBYTE, offsetof(Buffer, line_end_missing), READONLY,
     "Bytes still missing of the last chunk's line end."},
    {0},
};

static PyGetSetDef buffer_values[] = {
    {"opening_matched", (getter)Buffer_opening_matched, NULL, "Whether the answer began with the opening.", NULL},
    {0},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_doc, "What has arrived of an answer, each chunk with its stamp."},
    {Py_tp_dealloc, Buffer_dealloc},
    {Py_tp_methods, buffer_methods},
    {Py_tp_members, buffer_members},
    {Py_tp_getset, buffer_values},
    {Py_sq_length, Buffer_length},
    {0},
};

static PyType_Spec buffer_spec = {"harness.scenarios.client._reader.ReceiveBuffer", sizeof(Buffer), 0, Py_TPFLAGS_DEFAULT, buffer_slots};

/* -- Reader -------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *connection; /* null: nothing is read from this descriptor */
    int64_t last_ns;      /* when what was last read came: what is read next came later */
    Buffer *buffer;       /* null: whatever arrives is passed on */
    Pattern *pattern;     /* null: no event is known */
    uint8_t polled;       /* false: what arrives is read by the connection itself, which passes it to `take` */
} Socket;

typedef struct {
    PyTypeObject *buffer, *pattern;
} State;

typedef struct {
    PyObject_HEAD
    int epoll;
    int room;
    Socket *sockets; /* by descriptor */
    State types;
    char *scratch; /* PARTIAL bytes for what came before, then READ_SIZE for what comes */
    int64_t offset_ns; /* of the monotonic clock from the wall clock, in which the kernel stamps */
    int64_t now_ns;    /* when this round of reading began */
    unsigned long long events, bytes; /* that were read: events, and reads that were passed on */
    unsigned long long shared;        /* plain events that came with another in one read, and share its stamp */
    unsigned long long reads, unstamped; /* reads; those for which the kernel did not say when their bytes came */
    PyObject *error, *error_value, *error_trace; /* what the next return from read raises */
} Reader;

static Socket *socket_of(Reader *self, int fd) {
    return fd >= 0 && fd < self->room && self->sockets[fd].connection ? &self->sockets[fd] : NULL;
}

static void stop_storing(Socket *sock) {
    Buffer *buffer = sock->buffer;
    Pattern *pattern = sock->pattern;
    sock->buffer = NULL;
    sock->pattern = NULL;
    Py_XDECREF((PyObject *)buffer);
    Py_XDECREF((PyObject *)pattern);
}

/* The size of the HTTP chunk that `data` begins with; 0 when it is incomplete, -1 when it is for the full parser. Also
   where its content begins and how long that is (0 for the last chunk). Its line end may be missing still. */
static Py_ssize_t chunk(const char *data, Py_ssize_t size, const char **content, Py_ssize_t *length) {
    Py_ssize_t digits = 0, value = 0;
    for (; digits < DIGITS && digits < size; digits++) {
        const char c = data[digits];
        if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
        else if (c >= 'a' && c <= 'f') value = value * 16 + (c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') value = value * 16 + (c - 'A' + 10);
        else break;
    }
    if (!digits || (data[0] == '0' && digits > 1)) return -1;
    if (digits == size) return 0;
    const Py_ssize_t whole = digits + 2 + value + 2;
    if (data[digits] != '\r') return -1;
    if (digits + 1 < size && data[digits + 1] != '\n') return -1;
    if (whole > size + (value ? 2 : 0)) return size == whole - 1 && data[whole - 2] != '\r' ? -1 : 0;
    if ((size > whole - 2 && data[whole - 2] != '\r') || (size > whole - 1 && data[whole - 1] != '\n')) return -1;
    *content = data + digits + 2;
    *length = value;
    return whole;
}

/* The kind of plain event that this content of a chunk is, and its text; 0 when it is none. */
static int plain_event(const Pattern *pattern, const char *content, Py_ssize_t size, const char **text,
                       Py_ssize_t *length) {
    for (int i = 0; pattern && i < pattern->count; i++) {
        const Event *event = &pattern->events[i];
        *text = content + event->before.size;
        *length = size - event->before.size - event->after_size;
        if (*length >= 1 && *length <= (Py_ssize_t)LONGEST && matches(&event->before, content, event->before.size) &&
            !memcmp(*text + *length, event->after, event->after_size))
            return i + 1;
    }
    return 0;
}

static int ends_an_event(const char *content, Py_ssize_t size) {
    if (size < 2 || content[size - 1] != '\n') return 0;
    return content[size - 2] == '\n' || (size > 2 && content[size - 2] == '\r' && content[size - 3] == '\n');
}

/* Whether an event ends in these bytes of a chunk that is not whole: it came before the chunk does. */
static int has_an_event(const char *data, Py_ssize_t size) {
    return memmem(data, size, "\n\n", 2) || memmem(data, size, "\n\r\n", 3);
}

static int done(PyObject *connection, PyObject *result) {
    Py_DECREF(connection);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int pass_on(PyObject *connection, const char *method, const char *data, Py_ssize_t size, int64_t stamp) {
    Py_INCREF(connection); /* the call may close it */
    return done(connection, PyObject_CallMethod(connection, method, "y#L", data, size, (long long)stamp));
}

static int lost(PyObject *connection, int error) {
    Py_INCREF(connection);
    return done(connection, error ? PyObject_CallMethod(connection, "failed", "i", error)
                                  : PyObject_CallMethod(connection, "lost", "O", Py_None));
}

static int ended(PyObject *connection, int64_t stamp) {
    Py_INCREF(connection);
    return done(connection, PyObject_CallMethod(connection, "ended", "L", (long long)stamp));
}

/* Take bytes that arrived; `data` lies in the buffer, with room before it. */
static int take(Reader *self, Socket *sock, char *data, Py_ssize_t size, int64_t stamp) {
    Buffer *const buffer = sock->buffer;
    const Pattern *const pattern = sock->pattern;
    const char *at = data, *const end = data + size, *content, *text;
    Py_ssize_t length, text_length, whole = 0;
    int last = 0, events = 0;
    if (!buffer) {
        self->events++;
        return pass_on(sock->connection, "received", data, size, stamp);
    }
    buffer->last_ns = stamp;
    if (buffer->partial) {
        at -= buffer->partial;
        memcpy((char *)at, buffer->data + buffer->size, buffer->partial);
        buffer->partial = 0;
    }
    for (; buffer->line_end_missing && at < end && *at == LINE_END[2 - buffer->line_end_missing]; at++)
        buffer->line_end_missing--;
    if (buffer->line_end_missing && at < end) whole = -1;
    if (buffer->opening) {
        const Py_ssize_t wanted = pattern ? pattern->opening.size : 0, here = end - at < wanted ? end - at : wanted;
        whole = wanted && matches(&pattern->opening, at, here) ? 0 : -1;
        if (!whole && here == wanted) {
            at += wanted;
            buffer->opening = 0;
            buffer->opening_matched = buffer->first = 1;
            self->events++;
        }
    }
    while (!buffer->opening && !buffer->line_end_missing && at < end && !last &&
           (whole = chunk(at, end - at, &content, &length)) > 0) {
        const int kind = buffer->inside ? 0 : plain_event(pattern, content, length, &text, &text_length);
        if (!kind && buffer->first) { /* its events are of no kind that is known: to be learned now, not at the end */
            whole = -1;
            break;
        }
        buffer->first = 0;
        if (Buffer_add(buffer, kind ? text : content, kind ? text_length : length, kind, stamp) < 0) return -1;
        self->events += length > 0;
        self->shared += kind && events++ > 0;
        if (!kind) {
            last = !length;
            buffer->inside = !ends_an_event(content, length);
        }
        at += whole;
        if (at > end) buffer->line_end_missing = (uint8_t)(at - end); /* it is checked when it comes */
    }
    if (at >= end && !last) return 0;
    if (!last && !whole && end - at <= PARTIAL && (buffer->opening || !has_an_event(at, end - at))) {
        if (Buffer_reserve(buffer, (uint64_t)buffer->size + (end - at)) < 0) return -1;
        memcpy(buffer->data + buffer->size, at, end - at);
        buffer->partial = (uint32_t)(end - at);
        return 0;
    }
    stop_storing(sock);
    if (at == end) return ended(sock->connection, stamp);
    self->events++;
    return pass_on(sock->connection, "unmatched", at, end - at, stamp);
}

/* Keep the first Python error of a round: the other sockets that are ready are told of only once. */
static void note_error(Reader *self) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (self->error) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return;
    }
    self->error = type;
    self->error_value = value;
    self->error_trace = trace;
}

enum { MORE, LESS, OVER }; /* after a read: there may be more; all was read that was there; nothing else will come */

/* When the kernel got the last of these bytes; now, where it did not say. However the wall clock was set meanwhile: not
   before what was read last. */
static int64_t arrived(Reader *self, Socket *sock, struct msghdr *message) {
    struct cmsghdr *said = CMSG_FIRSTHDR(message);
    int64_t stamp;
    self->reads++;
    if (said && said->cmsg_level == SOL_SOCKET && said->cmsg_type == SCM_TIMESTAMPNS) {
        struct timespec t;
        memcpy(&t, CMSG_DATA(said), sizeof t);
        stamp = in_ns(t) + self->offset_ns;
        if (stamp > self->now_ns) {
            const int64_t now = now_ns(CLOCK_MONOTONIC); /* seldom: most of it was there when the round began */
            if (stamp > now) stamp = now;
        }
        if (stamp < sock->last_ns) stamp = sock->last_ns;
    } else {
        stamp = now_ns(CLOCK_MONOTONIC);
        self->unstamped++;
    }
    return sock->last_ns = stamp;
}

static int receive(Reader *self, int fd) {
    Socket *sock = socket_of(self, fd);
    if (!sock) return OVER; /* closed by what came before it in this round */
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(struct timespec))];
    } control;
    struct iovec bytes = {self->scratch + PARTIAL, READ_SIZE};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    /* Not libc's recvmsg: in a process with threads that is a place to be cancelled at, which it costs more to be than
       to read so little. The same for epoll_pwait below. */
    ssize_t size = syscall(SYS_recvmsg, fd, &message, MSG_DONTWAIT);
    int error = size < 0 ? errno : 0;
    if (error == EINTR) return MORE;
    if (error == EAGAIN || error == EWOULDBLOCK) return OVER;
    if (size > 0) self->bytes += size;
    const int bad = size > 0 ? take(self, sock, self->scratch + PARTIAL, size, arrived(self, sock, &message))
                             : lost(sock->connection, error);
    if (bad < 0) note_error(self);
    return size <= 0 ? OVER : size == READ_SIZE ? MORE : LESS;
}

/* Edge-triggered: the kernel need not look again at every socket that was just emptied. So it must be emptied, and an
   end that came together with the last bytes, of which nothing else would tell, must be looked for. */
static void read_one(Reader *self, int fd, uint32_t events) {
    for (int reads = 0; reads < MANY; reads++) {
        int state = receive(self, fd);
        if (state == OVER || (state == LESS && !(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)))) return;
    }
    struct epoll_event again = {.events = EVENTS, .data.fd = fd}; /* a stream without end is not to starve the others */
    if (socket_of(self, fd)) epoll_ctl(self->epoll, EPOLL_CTL_MOD, fd, &again);
}

static PyObject *Reader_read(Reader *self, PyObject *Py_UNUSED(none)) {
    struct epoll_event ready[BATCH];
    const int64_t wall_ns = now_ns(CLOCK_REALTIME); /* first: held up in between, stamps are late, never early */
    self->now_ns = now_ns(CLOCK_MONOTONIC);
    self->offset_ns = self->now_ns - wall_ns;
    int more = 1;
    while (more && !self->error) {
        /* It never waits: no other thread need run meanwhile. */
        const int count = (int)syscall(SYS_epoll_pwait, self->epoll, ready, BATCH, 0, NULL, 8);
        if (count < 0 && errno != EINTR) return PyErr_SetFromErrno(PyExc_OSError);
        for (int i = 0; i < count; i++) read_one(self, ready[i].data.fd, ready[i].events);
        more = count >= MANY; /* else the loop's own turn costs less than to look in vain */
        if (more && now_ns(CLOCK_MONOTONIC) - self->now_ns > LONG_NS) break;
    }
    if (!self->error) return PyBool_FromLong(more);
    PyErr_Restore(self->error, self->error_value, self->error_trace);
    self->error = self->error_value = self->error_trace = NULL;
    return NULL;
}

static PyObject *Reader_add(Reader *self, PyObject *args) {
    PyObject *connection;
    int fd, polled;
    if (!PyArg_ParseTuple(args, "iOp", &fd, &connection, &polled)) return NULL;
    if (fd < 0 || socket_of(self, fd)) return PyErr_Format(PyExc_ValueError, "descriptor %d cannot be added", fd);
    struct epoll_event event = {.events = polled ? EVENTS : 0, .data.fd = fd};
    if (epoll_ctl(self->epoll, EPOLL_CTL_ADD, fd, &event) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    if (!polled) epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL); /* it is a socket, and open: that was the question */
    if (fd >= self->room) { /* only now: a number that is open is no larger than the limit of open files */
        int room = fd + 1 + self->room / 2;
        Socket *grown = PyMem_Realloc(self->sockets, room * sizeof(Socket));
        if (!grown) {
            if (polled) epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL);
            return PyErr_NoMemory();
        }
        memset(grown + self->room, 0, (room - self->room) * sizeof(Socket));
        self->sockets = grown;
        self->room = room;
    }
    Py_INCREF(connection);
    self->sockets[fd] = (Socket){.connection = connection, .polled = polled, .last_ns = now_ns(CLOCK_MONOTONIC)};
    Py_RETURN_NONE;
}

static PyObject *Reader_store(Reader *self, PyObject *args) {
    PyObject *buffer, *pattern;
    int fd, opening;
    if (!PyArg_ParseTuple(args, "iO!Op", &fd, self->types.buffer, &buffer, &pattern, &opening)) return NULL;
    if (pattern != Py_None && !PyObject_TypeCheck(pattern, self->types.pattern))
        return PyErr_Format(PyExc_TypeError, "no pattern");
    Socket *sock = socket_of(self, fd);
    if (!sock) Py_RETURN_NONE;
    Py_INCREF(buffer);
    if (pattern != Py_None) Py_INCREF(pattern);
    stop_storing(sock);
    sock->buffer = (Buffer *)buffer;
    sock->pattern = pattern != Py_None ? (Pattern *)pattern : NULL;
    sock->buffer->opening = opening;
    if (opening) sock->last_ns = now_ns(CLOCK_MONOTONIC); /* what came before the request is no answer to it */
    Py_RETURN_NONE;
}

static PyObject *Reader_take(Reader *self, PyObject *args) {
    const char *data;
    Py_ssize_t size;
    long long stamp;
    int fd;
    if (!PyArg_ParseTuple(args, "iy#L", &fd, &data, &size, &stamp)) return NULL;
    for (Py_ssize_t at = 0, part; at < size; at += part) {
        Socket *sock = socket_of(self, fd);
        if (!sock) break; /* closed by what came before */
        part = size - at < READ_SIZE ? size - at : READ_SIZE;
        if (sock->polled) self->events--; /* counted when it was passed on, as its bytes were */
        else self->bytes += part;
        memcpy(self->scratch + PARTIAL, data + at, part);
        if (take(self, sock, self->scratch + PARTIAL, part, stamp) < 0) return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *Reader_stop_storing(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Socket *sock = socket_of(self, (int)fd);
    if (sock) stop_storing(sock);
    Py_RETURN_NONE;
}

static PyObject *Reader_remove(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Socket *sock = socket_of(self, (int)fd);
    if (!sock) Py_RETURN_NONE;
    stop_storing(sock);
    int gone = sock->polled && epoll_ctl(self->epoll, EPOLL_CTL_DEL, (int)fd, NULL) < 0;
    if (gone) PyErr_SetFromErrno(PyExc_OSError);
    Py_CLEAR(sock->connection); /* last: it may be the last to hold the socket */
    if (gone) return NULL;
    Py_RETURN_NONE;
}

static void release_all(Reader *self) {
    for (int fd = 0; fd < self->room; fd++) {
        stop_storing(&self->sockets[fd]);
        Py_CLEAR(self->sockets[fd].connection);
    }
    if (self->epoll >= 0) close(self->epoll);
    self->epoll = -1;
}

static PyObject *Reader_close(Reader *self, PyObject *Py_UNUSED(none)) {
    release_all(self);
    Py_RETURN_NONE;
}

static PyObject *Reader_fileno(Reader *self, PyObject *Py_UNUSED(none)) { return PyLong_FromLong(self->epoll); }

static PyObject *Reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyTuple_Size(args) || (kwargs && PyDict_Size(kwargs)))
        return PyErr_Format(PyExc_TypeError, "Reader() takes no arguments");
    PyObject *module = PyType_GetModule(type);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Reader *self = module ? (Reader *)allocate(type, 0) : NULL;
    if (!self) return NULL;
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    self->types = *(State *)PyModule_GetState(module);
    Py_INCREF((PyObject *)self->types.buffer);
    Py_INCREF((PyObject *)self->types.pattern);
    self->scratch = PyMem_Malloc(PARTIAL + READ_SIZE);
    if (self->epoll < 0) PyErr_SetFromErrno(PyExc_OSError);
    else if (!self->scratch) PyErr_NoMemory();
    else return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void Reader_dealloc(Reader *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    release_all(self);
    PyMem_Free(self->sockets);
    PyMem_Free(self->scratch);
    Py_XDECREF((PyObject *)self->types.buffer);
    Py_XDECREF((PyObject *)self->types.pattern);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef reader_methods[] = {
    {"read", (PyCFunction)Reader_read, METH_NOARGS, "Read what has bytes, without waiting."},
    {"add", (PyCFunction)Reader_add, METH_VARARGS, "Read from this descriptor from now on."},
    {"store", (PyCFunction)Reader_store, METH_VARARGS, "Store the answer that arrives on a descriptor."},
    {"take", (PyCFunction)Reader_take, METH_VARARGS, "Take bytes of an unpolled descriptor, or that were passed on."},
    {"stop_storing", (PyCFunction)Reader_stop_storing, METH_O, "Pass on whatever arrives from now on."},
    {"remove", (PyCFunction)Reader_remove, METH_O, "Read from it no more."},
    {"close", (PyCFunction)Reader_close, METH_NOARGS, "Stop; sockets are closed by their owners."},
    {"fileno", (PyCFunction)Reader_fileno, METH_NOARGS, "A descriptor that is readable while there is work."},
    {0},
};

static PyMemberDef reader_members[] = {
    {"events", T_ULONGLONG, offsetof(Reader, events), READONLY, "How many plain events, and other reads, were read."},
    {"bytes", T_ULONGLONG, offsetof(Reader, bytes), READONLY, "How many bytes were read."},
    {"shared", T_ULONGLONG, offsetof(Reader, shared), READONLY, "How many plain events share a read with another."},
    {"reads", T_ULONGLONG, offsetof(Reader, reads), READONLY, "How often bytes were received."},
    {"unstamped", T_ULONGLONG, offsetof(Reader, unstamped), READONLY, "How often the kernel gave no time for them."},
    {0},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_doc, "Receives, stamps and stores, for every descriptor that has bytes."},
    {Py_tp_new, Reader_new},
    {Py_tp_dealloc, Reader_dealloc},
    {Py_tp_methods, reader_methods},
    {Py_tp_members, reader_members},
    {0},
};

static PyType_Spec reader_spec = {"harness.scenarios.client._reader.Reader", sizeof(Reader), 0, Py_TPFLAGS_DEFAULT, reader_slots};

/* -- the module ---------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module) {
    State *types = PyModule_GetState(module);
    for (int c = 0; c < 256; c++) {
        const int digit = c >= '0' && c <= '9', letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        may_be[c] = (digit ? DIGIT | WORD : 0) | (letter || c == '_' || c == '-' ? WORD : 0) |
                    (c && c != '\r' && c != '\n' ? VALUE : 0);
    }
    types->buffer = (PyTypeObject *)PyType_FromModuleAndSpec(module, &buffer_spec, NULL);
    if (!types->buffer || PyModule_AddType(module, types->buffer) < 0) return -1;
    types->pattern = (PyTypeObject *)PyType_FromModuleAndSpec(module, &pattern_spec, NULL);
    if (!types->pattern || PyModule_AddType(module, types->pattern) < 0) return -1;
    PyObject *reader = PyType_FromModuleAndSpec(module, &reader_spec, NULL);
    int added = reader ? PyModule_AddType(module, (PyTypeObject *)reader) : -1;
    Py_XDECREF(reader);
    return added;
}

static int module_clear(PyObject *module) {
    State *types = PyModule_GetState(module);
    Py_CLEAR(types->buffer);
    Py_CLEAR(types->pattern);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_reader", "The hot path, compiled (see scenarios/client/reader.py).", sizeof(State),
    NULL, module_slots, NULL, module_clear, module_free,
};

PyMODINIT_FUNC PyInit__reader(void) { return PyModuleDef_Init(&definition); }
