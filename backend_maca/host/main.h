// The command of a generated program: reads .npy files, runs entry points one after the other, writes .npy files.
#pragma once
#include <exception>

#include "machine.h"

namespace sb_host {

struct Dimension {
  int64_t size;  // -1 for a dynamic one
  const char* name;
  int64_t low, high;  // of a dynamic one; high -1 for no limit
};

struct Input {
  const char* name;
  Type type;
  std::vector<Dimension> shape;
};

struct Entry {
  const char* name;
  std::vector<Input> inputs;
  bool uses_state;
  size_t outputs;
  std::vector<Type> types;  // of the results that the model declares, the first of the outputs
  std::vector<Buffer> (*run)(Machine&, const std::vector<Buffer>&);
};

// How a tensor of the state begins: filled with one element, but for a block.
struct Field {
  Type type;
  Shape shape;  // -1 for the batch
  std::string fill;
  Shape block_at, block_shape;
  int64_t block_offset;  // in constants.bin
};

inline Buffer fresh(Machine& machine, const Field& field, int64_t batch, const Mapping& constants) {
  Shape shape = field.shape;
  for (int64_t& size : shape) size = size < 0 ? batch : size;
  const int64_t count = count_of(shape), size = size_of(field.type);
  std::vector<char> data(count * size);
  const char* block = nullptr;
  if (!field.block_at.empty()) block = constants.at(field.block_offset, count_of(field.block_shape) * size);
  for (int64_t i = 0; i < count; ++i) {
    const char* element = field.fill.data();
    int64_t rest = i, place = 0, step = 1;
    bool inside = block != nullptr;
    for (size_t axis = shape.size(); inside && axis-- > 0;) {
      const int64_t at = rest % shape[axis] - field.block_at[axis];
      rest /= shape[axis];
      if (field.shape[axis] < 0) continue;  // the block holds for each entry of the batch
      inside = at >= 0 && at < field.block_shape[axis];
      place += at * step;
      step *= field.block_shape[axis];
    }
    memcpy(&data[i * size], inside ? block + place * size : element, size);
  }
  return machine.upload(field.type, shape, data.data());
}

inline int usage(const std::vector<Entry>& entries, const std::string& why) {
  fprintf(stderr, "error: %s\n", why.c_str());
  fprintf(stderr,
          "usage: ./program [--batch N] [-o PREFIX] ENTRY FILE.npy... [then ENTRY FILE.npy...]...\n"
          "Runs entry points in turn, on one state; the results of the first go to PREFIX0.0.npy and so on.\n");
  for (const Entry& entry : entries) {
    fprintf(stderr, "  %s", entry.name);
    for (const Input& input : entry.inputs) fprintf(stderr, " %s", input.name);
    fprintf(stderr, "\n");
  }
  return 2;
}

inline Buffer read_input(Machine& machine, const Input& input, const std::string& path, std::map<std::string, int64_t>& sizes) {
  Shape declared;
  for (const Dimension& d : input.shape) declared.push_back(d.size);
  Buffer found = read_npy(machine, path, input.type, declared);
  for (size_t axis = 0; axis < declared.size(); ++axis) {
    const Dimension& d = input.shape[axis];
    if (d.size >= 0) continue;
    const int64_t size = found.shape[axis], known = sizes.emplace(d.name, size).first->second;
    if (size != known || size < d.low || (d.high >= 0 && size > d.high))
      fail(path + " has " + d.name + " = " + std::to_string(size),
           size != known ? "elsewhere it is " + std::to_string(known) : std::string("the program was not compiled for it"));
  }
  return found;
}

inline int run_all(int count, char** words, const std::vector<Entry>& entries, const std::vector<Field>& fields,
                   const char* batch_name, const Mapping& constants, Machine& machine) {
  int64_t batch = 1;
  std::string prefix;
  int i = 1;
  for (; i + 1 < count && words[i][0] == '-'; i += 2) {
    if (!strcmp(words[i], "--batch")) batch = atoll(words[i + 1]);
    else if (!strcmp(words[i], "-o")) prefix = words[i + 1];
    else return usage(entries, std::string("unknown option ") + words[i]);
  }
  if (i >= count) return usage(entries, "no entry point is given");
  if (batch < 1) return usage(entries, "--batch is a number from 1 on");
  std::vector<Buffer> state;
  for (const Field& field : fields) state.push_back(fresh(machine, field, batch, constants));
  for (int turn = 0; i < count; ++turn) {
    const Entry* entry = nullptr;
    for (const Entry& e : entries) entry = !strcmp(e.name, words[i]) ? &e : entry;
    if (!entry) return usage(entries, std::string("there is no entry point ") + words[i]);
    ++i;
    std::vector<Buffer> arguments;
    std::map<std::string, int64_t> sizes;
    if (entry->uses_state && *batch_name) sizes[batch_name] = batch;
    for (const Input& input : entry->inputs) {
      if (i >= count || !strcmp(words[i], "then")) return usage(entries, std::string(entry->name) + " lacks " + input.name);
      arguments.push_back(read_input(machine, input, words[i++], sizes));
    }
    if (i < count && strcmp(words[i++], "then")) return usage(entries, std::string(entry->name) + " takes no " + words[i - 1]);
    if (entry->uses_state) arguments.insert(arguments.end(), state.begin(), state.end());
    std::vector<Buffer> results = entry->run(machine, arguments);
    for (size_t j = 0; j < entry->outputs; ++j) {
      const std::string path = prefix + std::to_string(turn) + "." + std::to_string(j) + ".npy";
      if (j < entry->types.size()) results[j].type = entry->types[j];  // kernels know no u8
      write_npy(machine, path, results[j]);
    }
    if (entry->uses_state) state.assign(results.begin() + entry->outputs, results.end());
  }
  return 0;
}

inline int main_of(int count, char** words, const std::vector<Entry>& entries, const std::vector<Field>& fields,
                   const char* batch_name, const Mapping& constants, Machine& machine) {
  try {
    return run_all(count, words, entries, fields, batch_name, constants, machine);
  } catch (const std::exception& error) {  // std::bad_alloc, std::length_error
    fail("this machine has not enough memory", error.what());
  }
}

}  // namespace sb_host
