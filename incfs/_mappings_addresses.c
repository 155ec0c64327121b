/* Storage addresses, many at a time. */
#include "_mappings.h"

#include <stdbool.h>
#include <string.h>

enum { BLOCK_BITS = 48, DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS };

PyObject *function_stored(PyObject *module, PyObject *addresses)
{
    (void)module;
    Py_buffer view;
    if (PyObject_GetBuffer(addresses, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *found = PyBytes_FromStringAndSize(NULL, view.len);
    const uint64_t *all = view.buf;
    size_t count = (size_t)view.len / 8, kept = 0;
    uint64_t *target = found ? (uint64_t *)(void *)PyBytes_AS_STRING(found) : NULL;
    for (size_t i = 0; found && i < count; i++)
        if (all[i] > PLANE_HOLE)
            target[kept++] = all[i];
    PyBuffer_Release(&view);
    if (found)
        _PyBytes_Resize(&found, (Py_ssize_t)(8 * kept));
    return found;
}

/* Sorts by one digit after the other; a digit that all have in common costs nothing. */
static void sort_addresses(uint64_t **addresses, uint64_t **spare, size_t count)
{
    uint64_t differing = 0;
    for (size_t i = 1; i < count; i++)
        differing |= (*addresses)[i] ^ (*addresses)[0];
    for (unsigned shift = 0; shift < 64 && differing >> shift; shift += DIGIT_BITS) {
        size_t places[DIGITS] = {0}, place = 0;
        if (!(differing >> shift & (DIGITS - 1)))
            continue;
        for (size_t i = 0; i < count; i++)
            places[(*addresses)[i] >> shift & (DIGITS - 1)]++;
        for (size_t digit = 0; digit < DIGITS; digit++) {
            size_t of_digit = places[digit];
            places[digit] = place;
            place += of_digit;
        }
        for (size_t i = 0; i < count; i++)
            (*spare)[places[(*addresses)[i] >> shift & (DIGITS - 1)]++] = (*addresses)[i];
        uint64_t *sorted = *spare;
        *spare = *addresses;
        *addresses = sorted;
    }
}

static bool is_ascending(const uint64_t *addresses, size_t count)
{
    for (size_t i = 1; i < count; i++)
        if (addresses[i] <= addresses[i - 1])
            return false;
    return true;
}

/* Makes (storage volume, group, bit set) of the addresses of the first one's group; gives how many they are. */
static size_t append_group(PyObject *list, const uint64_t *addresses, size_t count, size_t group_blocks)
{
    uint64_t storage = addresses[0] >> BLOCK_BITS, block = addresses[0] & ((UINT64_C(1) << BLOCK_BITS) - 1);
    uint64_t base = addresses[0] - block % group_blocks;
    PyObject *bits = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)group_blocks / 8);
    if (!bits)
        return 0;
    char *set = PyBytes_AS_STRING(bits);
    memset(set, 0, group_blocks / 8);
    size_t taken = 0;
    for (; taken < count && addresses[taken] - base < group_blocks; taken++) {
        uint64_t member = addresses[taken] - base;
        if (taken && addresses[taken] == addresses[taken - 1])
            PyErr_Format(PyExc_AssertionError, "block %llu of storage volume %llu was given twice",
                         (unsigned long long)(block - block % group_blocks + member), (unsigned long long)storage);
        set[member / 8] = (char)(set[member / 8] | 1 << member % 8);
    }
    PyObject *made = Py_BuildValue("(KKN)", (unsigned long long)storage, (unsigned long long)(block / group_blocks), bits);
    if (made && !PyErr_Occurred())
        PyList_Append(list, made);
    Py_XDECREF(made);
    return taken;
}

PyObject *function_groups(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer view;
    Py_ssize_t group_blocks;
    if (!PyArg_ParseTuple(args, "y*n", &view, &group_blocks))
        return NULL;
    size_t count = (size_t)view.len / 8;
    uint64_t *memory = PyMem_Malloc(2 * count * sizeof *memory + 1), *addresses = memory, *spare = memory + count;
    PyObject *list = memory ? PyList_New(0) : PyErr_NoMemory();
    if (list && (group_blocks <= 0 || group_blocks % 8 || view.len % 8))
        PyErr_SetString(PyExc_ValueError, "not addresses, or a group that is no whole number of bytes");
    if (list && !PyErr_Occurred()) {
        memcpy(addresses, view.buf, (size_t)view.len);
        if (!is_ascending(addresses, count))
            sort_addresses(&addresses, &spare, count);
        for (size_t i = 0; i < count && !PyErr_Occurred();)
            i += append_group(list, addresses + i, count - i, (size_t)group_blocks);
    }
    PyMem_Free(memory);
    PyBuffer_Release(&view);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}
