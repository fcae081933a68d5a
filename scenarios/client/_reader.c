/* The hot path of the load generator, compiled: what `scenarios/client/reader.py` says in Python, said in C.

   Both have the same two types and the same behaviour, which tests/test_hot_path.py compares byte by byte; the Python
   one is the one to read first. This one exists because a token costs the interpreter more than it costs the kernel.
   It builds against the stable ABI of Python 3.11, and where it cannot be built the Python one is used. */

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
    Py_ssize_t end; /* of a stretch of bytes that are alike in this: */
    uint8_t may;    /* 0: each is the same; else any of these */
} Stretch;

typedef struct {
    char *bytes;
    Py_ssize_t size;
    Stretch *stretches;
} Likeness;

typedef struct {
    Likeness before;
    char *after;
    Py_ssize_t after_size;
} Event;

typedef struct {
    PyObject_HEAD
    Likeness opening;
    Event *events;
    int count;
} Pattern;

#define KINDS 15 /* a Mark has four bits for the kind */

/* Whether `data` is like the first `size` bytes of it. */
static int like(const Likeness *as, const char *data, Py_ssize_t size) {
    const Stretch *stretch = as->stretches;
    for (Py_ssize_t at = 0; at < size; at = stretch++->end) {
        const Py_ssize_t end = stretch->end < size ? stretch->end : size;
        if (!stretch->may) {
            if (memcmp(data + at, as->bytes + at, end - at)) return 0;
        } else {
            for (Py_ssize_t i = at; i < end; i++)
                if (!(may_be[(uint8_t)data[i]] & stretch->may)) return 0;
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

static int Likeness_init(Likeness *self, PyObject *bytes, PyObject *loose) {
    char *same, *kinds;
    Py_ssize_t size, loose_size;
    if (PyBytes_AsStringAndSize(bytes, &same, &size) < 0 || PyBytes_AsStringAndSize(loose, &kinds, &loose_size) < 0)
        return -1;
    if (size != loose_size) {
        PyErr_Format(PyExc_ValueError, "%zd bytes, and %zd that say which may differ", size, loose_size);
        return -1;
    }
    self->bytes = copy_of(same, size);
    self->stretches = self->bytes ? PyMem_Malloc((size + 1) * sizeof(Stretch)) : NULL;
    if (!self->stretches) {
        if (self->bytes) PyErr_NoMemory();
        return -1;
    }
    Stretch *last = self->stretches;
    for (Py_ssize_t i = 0; i < size; i++) {
        const uint8_t may = kinds[i] == 'w' ? WORD : kinds[i] == 'd' ? DIGIT : kinds[i] == 'v' ? VALUE : 0;
        if (i && may != last->may) last++;
        *last = (Stretch){.end = i + 1, .may = may};
    }
    self->size = size;
    return 0;
}

static void Likeness_free(Likeness *self) {
    PyMem_Free(self->bytes);
    PyMem_Free(self->stretches);
}

static void Pattern_dealloc(Pattern *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Likeness_free(&self->opening);
    for (int i = 0; i < self->count; i++) {
        Likeness_free(&self->events[i].before);
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
    if (!PyArg_ParseTuple(tuple, "SSS", &before, &loose, &after) || Likeness_init(&self->before, before, loose) < 0 ||
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
    int bad = Likeness_init(&self->opening, opening, loose) < 0;
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
    {Py_tp_doc, "What the answers of a server look like."},
    {Py_tp_new, Pattern_new},
    {Py_tp_dealloc, Pattern_dealloc},
    {0},
};

static PyType_Spec pattern_spec = {"scenarios.client._reader.Pattern", sizeof(Pattern), 0, Py_TPFLAGS_DEFAULT, pattern_slots};

/* -- Kept ---------------------------------------------------------------------------------------------------------- */

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
    uint32_t raw;   /* bytes of contents */
    uint32_t odd;   /* not 0: some text has a quote, a backslash, or what is not printable ASCII */
    uint8_t opening, opened; /* the opening of the answer is still to come; it came */
    uint8_t first;  /* the first event after it is still to come */
    uint8_t inside; /* the last chunk did not end with an event */
    uint8_t owed;   /* bytes of its line end that lack; when other bytes came, they never will */
    int64_t last_ns;
} Kept;

static int Kept_reserve(Kept *self, uint64_t size) {
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

static int Kept_add(Kept *self, const char *bytes, Py_ssize_t length, int kind, int64_t stamp) {
    const Mark mark = {.stamp = stamp, .length = (uint32_t)length, .kind = kind};
    const uint64_t size = self->size + sizeof mark + (uint64_t)length;
    if (Kept_reserve(self, size) < 0) return -1;
    memcpy(self->data + self->size, &mark, sizeof mark);
    memcpy(self->data + self->size + sizeof mark, bytes, length);
    if (kind) {
        uint32_t odd = 0;
        for (Py_ssize_t i = 0; i < length; i++)
            odd |= (bytes[i] < ' ') | (bytes[i] > '~') | (bytes[i] == '"') | (bytes[i] == '\\');
        self->odd |= odd;
    } else {
        self->raw += (uint32_t)length;
    }
    self->size = (uint32_t)size;
    self->count++;
    return 0;
}

static void Kept_dealloc(Kept *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyMem_Free(self->data);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Py_ssize_t Kept_length(Kept *self) { return self->count; }

static PyObject *Kept_rest(Kept *self, PyObject *Py_UNUSED(none)) {
    PyObject *rest = PyBytes_FromStringAndSize(self->data + self->size, self->partial);
    if (rest) self->partial = 0;
    return rest;
}

static PyObject *Kept_clear(Kept *self, PyObject *Py_UNUSED(none)) {
    char *rest = NULL;
    if (self->partial) {
        rest = copy_of(self->data + self->size, self->partial);
        if (!rest) return NULL;
    }
    PyMem_Free(self->data);
    self->data = rest;
    self->room = self->partial;
    self->count = self->size = self->raw = self->odd = 0;
    Py_RETURN_NONE;
}

static PyObject *Kept_run(Kept *self, uint32_t *at, int64_t since, int whole) {
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

static PyObject *Kept_runs(Kept *self, PyObject *args) {
    long long since;
    int whole;
    if (!PyArg_ParseTuple(args, "Lp", &since, &whole)) return NULL;
    PyObject *runs = PyList_New(0);
    for (uint32_t at = 0; runs && at < self->size;) {
        PyObject *run = Kept_run(self, &at, since, whole);
        if (!run || PyList_Append(runs, run) < 0) Py_CLEAR(runs);
        Py_XDECREF(run);
    }
    return runs;
}

static PyObject *Kept_opened(Kept *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(self->opened); }

static PyMethodDef kept_methods[] = {
    {"runs", (PyCFunction)Kept_runs, METH_VARARGS, "Stretches of one kind: kind, stamps, parts."},
    {"rest", (PyCFunction)Kept_rest, METH_NOARGS, "Take the bytes of a chunk that is not whole."},
    {"clear", (PyCFunction)Kept_clear, METH_NOARGS, "Hold nothing but that."},
    {0},
};

static PyMemberDef kept_members[] = {
    {"last_ns", T_LONGLONG, offsetof(Kept, last_ns), READONLY, "When something arrived last; 0 for never."},
    {"raw", T_UINT, offsetof(Kept, raw), READONLY, "Bytes held of contents of chunks."},
    {"size", T_UINT, offsetof(Kept, size), READONLY, "Bytes held."},
    {"owed", T_UBYTE, offsetof(Kept, owed), READONLY, "Bytes of the last chunk's line end that lack."},
    {0},
};

static PyGetSetDef kept_values[] = {
    {"opened", (getter)Kept_opened, NULL, "Whether the answer began with the opening of its pattern.", NULL},
    {0},
};

static PyType_Slot kept_slots[] = {
    {Py_tp_doc, "What has arrived of an answer and when."},
    {Py_tp_dealloc, Kept_dealloc},
    {Py_tp_methods, kept_methods},
    {Py_tp_members, kept_members},
    {Py_tp_getset, kept_values},
    {Py_sq_length, Kept_length},
    {0},
};

static PyType_Spec kept_spec = {"scenarios.client._reader.Kept", sizeof(Kept), 0, Py_TPFLAGS_DEFAULT, kept_slots};

/* -- Reader -------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *connection; /* null: nothing is read from this descriptor */
    int64_t came_ns;      /* when what was last read came: what is read next came later */
    Kept *kept;           /* null: whatever arrives is handed on */
    Pattern *pattern;     /* null: no event is known */
    uint8_t polled;       /* false: what arrives is read by the connection itself, which hands it to `take` */
} Lane;

typedef struct {
    PyTypeObject *kept, *pattern;
} State;

typedef struct {
    PyObject_HEAD
    int epoll;
    int room;
    Lane *lanes; /* by descriptor */
    State types;
    char *buffer; /* PARTIAL bytes for what came before, then READ_SIZE for what comes */
    int64_t offset_ns; /* of the monotonic clock from the wall clock, in which the kernel stamps */
    int64_t now_ns;    /* when this round of reading began */
    unsigned long long events, bytes; /* that were read: events, and reads of what is handed on */
    unsigned long long shared;        /* plain events that came with another in one read, and share its stamp */
    unsigned long long reads, unstamped; /* reads; those for which the kernel did not say when their bytes came */
    PyObject *error, *error_value, *error_trace; /* what the next return from read raises */
} Reader;

static Lane *lane_of(Reader *self, int fd) {
    return fd >= 0 && fd < self->room && self->lanes[fd].connection ? &self->lanes[fd] : NULL;
}

static void lane_keep_all(Lane *lane) {
    Kept *kept = lane->kept;
    Pattern *pattern = lane->pattern;
    lane->kept = NULL;
    lane->pattern = NULL;
    Py_XDECREF((PyObject *)kept);
    Py_XDECREF((PyObject *)pattern);
}

/* The HTTP chunk that `data` begins with: its bytes, or 0 when more may come, or -1 when it is for the book; and where
   its content begins, and how long that is: 0 for the last chunk. Its line end may lack: the content came without. */
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
        if (*length >= 1 && *length <= (Py_ssize_t)LONGEST && like(&event->before, content, event->before.size) &&
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

static int hand_on(PyObject *connection, const char *method, const char *data, Py_ssize_t size, int64_t stamp) {
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
static int take(Reader *self, Lane *lane, char *data, Py_ssize_t size, int64_t stamp) {
    Kept *const kept = lane->kept;
    const Pattern *const pattern = lane->pattern;
    const char *at = data, *const end = data + size, *content, *text;
    Py_ssize_t length, text_length, whole = 0;
    int last = 0, events = 0;
    if (!kept) {
        self->events++;
        return hand_on(lane->connection, "received", data, size, stamp);
    }
    kept->last_ns = stamp;
    if (kept->partial) {
        at -= kept->partial;
        memcpy((char *)at, kept->data + kept->size, kept->partial);
        kept->partial = 0;
    }
    for (; kept->owed && at < end && *at == LINE_END[2 - kept->owed]; at++) kept->owed--;
    if (kept->owed && at < end) whole = -1;
    if (kept->opening) {
        const Py_ssize_t wanted = pattern ? pattern->opening.size : 0, here = end - at < wanted ? end - at : wanted;
        whole = wanted && like(&pattern->opening, at, here) ? 0 : -1;
        if (!whole && here == wanted) {
            at += wanted;
            kept->opening = 0;
            kept->opened = kept->first = 1;
            self->events++;
        }
    }
    while (!kept->opening && !kept->owed && at < end && !last &&
           (whole = chunk(at, end - at, &content, &length)) > 0) {
        const int kind = kept->inside ? 0 : plain_event(pattern, content, length, &text, &text_length);
        if (!kind && kept->first) { /* its events are of no kind that is known: to be learned now, not at the end */
            whole = -1;
            break;
        }
        kept->first = 0;
        if (Kept_add(kept, kind ? text : content, kind ? text_length : length, kind, stamp) < 0) return -1;
        self->events += length > 0;
        self->shared += kind && events++ > 0;
        if (!kind) {
            last = !length;
            kept->inside = !ends_an_event(content, length);
        }
        at += whole;
        if (at > end) kept->owed = (uint8_t)(at - end); /* it is checked when it comes */
    }
    if (at >= end && !last) return 0;
    if (!last && !whole && end - at <= PARTIAL && (kept->opening || !has_an_event(at, end - at))) {
        if (Kept_reserve(kept, (uint64_t)kept->size + (end - at)) < 0) return -1;
        memcpy(kept->data + kept->size, at, end - at);
        kept->partial = (uint32_t)(end - at);
        return 0;
    }
    lane_keep_all(lane);
    if (at == end) return ended(lane->connection, stamp);
    self->events++;
    return hand_on(lane->connection, "other", at, end - at, stamp);
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
static int64_t arrived(Reader *self, Lane *lane, struct msghdr *message) {
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
        if (stamp < lane->came_ns) stamp = lane->came_ns;
    } else {
        stamp = now_ns(CLOCK_MONOTONIC);
        self->unstamped++;
    }
    return lane->came_ns = stamp;
}

static int receive(Reader *self, int fd) {
    Lane *lane = lane_of(self, fd);
    if (!lane) return OVER; /* closed by what came before it in this round */
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(struct timespec))];
    } control;
    struct iovec bytes = {self->buffer + PARTIAL, READ_SIZE};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    /* Not libc's recvmsg: in a process with threads that is a place to be cancelled at, which it costs more to be than
       to read so little. The same for epoll_pwait below. */
    ssize_t size = syscall(SYS_recvmsg, fd, &message, MSG_DONTWAIT);
    int error = size < 0 ? errno : 0;
    if (error == EINTR) return MORE;
    if (error == EAGAIN || error == EWOULDBLOCK) return OVER;
    if (size > 0) self->bytes += size;
    const int bad = size > 0 ? take(self, lane, self->buffer + PARTIAL, size, arrived(self, lane, &message))
                             : lost(lane->connection, error);
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
    if (lane_of(self, fd)) epoll_ctl(self->epoll, EPOLL_CTL_MOD, fd, &again);
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
    if (fd < 0 || lane_of(self, fd)) return PyErr_Format(PyExc_ValueError, "descriptor %d cannot be added", fd);
    struct epoll_event event = {.events = polled ? EVENTS : 0, .data.fd = fd};
    if (epoll_ctl(self->epoll, EPOLL_CTL_ADD, fd, &event) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    if (!polled) epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL); /* it is a socket, and open: that was the question */
    if (fd >= self->room) { /* only now: a number that is open is no larger than the limit of open files */
        int room = fd + 1 + self->room / 2;
        Lane *grown = PyMem_Realloc(self->lanes, room * sizeof(Lane));
        if (!grown) {
            if (polled) epoll_ctl(self->epoll, EPOLL_CTL_DEL, fd, NULL);
            return PyErr_NoMemory();
        }
        memset(grown + self->room, 0, (room - self->room) * sizeof(Lane));
        self->lanes = grown;
        self->room = room;
    }
    Py_INCREF(connection);
    self->lanes[fd] = (Lane){.connection = connection, .polled = polled, .came_ns = now_ns(CLOCK_MONOTONIC)};
    Py_RETURN_NONE;
}

static PyObject *Reader_keep(Reader *self, PyObject *args) {
    PyObject *kept, *pattern;
    int fd, opening;
    if (!PyArg_ParseTuple(args, "iO!Op", &fd, self->types.kept, &kept, &pattern, &opening)) return NULL;
    if (pattern != Py_None && !PyObject_TypeCheck(pattern, self->types.pattern))
        return PyErr_Format(PyExc_TypeError, "no pattern");
    Lane *lane = lane_of(self, fd);
    if (!lane) Py_RETURN_NONE;
    Py_INCREF(kept);
    if (pattern != Py_None) Py_INCREF(pattern);
    lane_keep_all(lane);
    lane->kept = (Kept *)kept;
    lane->pattern = pattern != Py_None ? (Pattern *)pattern : NULL;
    lane->kept->opening = opening;
    if (opening) lane->came_ns = now_ns(CLOCK_MONOTONIC); /* what came before the request is no answer to it */
    Py_RETURN_NONE;
}

static PyObject *Reader_take(Reader *self, PyObject *args) {
    const char *data;
    Py_ssize_t size;
    long long stamp;
    int fd;
    if (!PyArg_ParseTuple(args, "iy#L", &fd, &data, &size, &stamp)) return NULL;
    for (Py_ssize_t at = 0, part; at < size; at += part) {
        Lane *lane = lane_of(self, fd);
        if (!lane) break; /* closed by what came before */
        part = size - at < READ_SIZE ? size - at : READ_SIZE;
        if (lane->polled) self->events--; /* counted when it was handed on, as its bytes were */
        else self->bytes += part;
        memcpy(self->buffer + PARTIAL, data + at, part);
        if (take(self, lane, self->buffer + PARTIAL, part, stamp) < 0) return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *Reader_keep_all(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Lane *lane = lane_of(self, (int)fd);
    if (lane) lane_keep_all(lane);
    Py_RETURN_NONE;
}

static PyObject *Reader_remove(Reader *self, PyObject *arg) {
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    Lane *lane = lane_of(self, (int)fd);
    if (!lane) Py_RETURN_NONE;
    lane_keep_all(lane);
    int gone = lane->polled && epoll_ctl(self->epoll, EPOLL_CTL_DEL, (int)fd, NULL) < 0;
    if (gone) PyErr_SetFromErrno(PyExc_OSError);
    Py_CLEAR(lane->connection); /* last: it may be the last to hold the socket */
    if (gone) return NULL;
    Py_RETURN_NONE;
}

static void release_all(Reader *self) {
    for (int fd = 0; fd < self->room; fd++) {
        lane_keep_all(&self->lanes[fd]);
        Py_CLEAR(self->lanes[fd].connection);
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
    Py_INCREF((PyObject *)self->types.kept);
    Py_INCREF((PyObject *)self->types.pattern);
    self->buffer = PyMem_Malloc(PARTIAL + READ_SIZE);
    if (self->epoll < 0) PyErr_SetFromErrno(PyExc_OSError);
    else if (!self->buffer) PyErr_NoMemory();
    else return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void Reader_dealloc(Reader *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    release_all(self);
    PyMem_Free(self->lanes);
    PyMem_Free(self->buffer);
    Py_XDECREF((PyObject *)self->types.kept);
    Py_XDECREF((PyObject *)self->types.pattern);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef reader_methods[] = {
    {"read", (PyCFunction)Reader_read, METH_NOARGS, "Read what has bytes, without waiting."},
    {"add", (PyCFunction)Reader_add, METH_VARARGS, "Read from this descriptor from now on."},
    {"keep", (PyCFunction)Reader_keep, METH_VARARGS, "Keep the answer that arrives on a descriptor."},
    {"take", (PyCFunction)Reader_take, METH_VARARGS, "Take bytes of a descriptor that is not polled, or that were handed on."},
    {"keep_all", (PyCFunction)Reader_keep_all, METH_O, "Hand on whatever arrives again."},
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
    {Py_tp_doc, "Receives, stamps and keeps, for every descriptor that has bytes."},
    {Py_tp_new, Reader_new},
    {Py_tp_dealloc, Reader_dealloc},
    {Py_tp_methods, reader_methods},
    {Py_tp_members, reader_members},
    {0},
};

static PyType_Spec reader_spec = {"scenarios.client._reader.Reader", sizeof(Reader), 0, Py_TPFLAGS_DEFAULT, reader_slots};

/* -- the module ---------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module) {
    State *types = PyModule_GetState(module);
    for (int c = 0; c < 256; c++) {
        const int digit = c >= '0' && c <= '9', letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        may_be[c] = (digit ? DIGIT | WORD : 0) | (letter || c == '_' || c == '-' ? WORD : 0) |
                    (c && c != '\r' && c != '\n' ? VALUE : 0);
    }
    types->kept = (PyTypeObject *)PyType_FromModuleAndSpec(module, &kept_spec, NULL);
    if (!types->kept || PyModule_AddType(module, types->kept) < 0) return -1;
    types->pattern = (PyTypeObject *)PyType_FromModuleAndSpec(module, &pattern_spec, NULL);
    if (!types->pattern || PyModule_AddType(module, types->pattern) < 0) return -1;
    PyObject *reader = PyType_FromModuleAndSpec(module, &reader_spec, NULL);
    int added = reader ? PyModule_AddType(module, (PyTypeObject *)reader) : -1;
    Py_XDECREF(reader);
    return added;
}

static int module_clear(PyObject *module) {
    State *types = PyModule_GetState(module);
    Py_CLEAR(types->kept);
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
