// Answers requests on stdin with the kernels run by the emulator: a line of words, then the inputs' bytes. Every buffer
// is a heap block of exactly its size, so that AddressSanitizer sees a step outside, and outputs start as NaN bits.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "../../../kernels/kernels.h"
#include "simt.h"

namespace {

struct Buffer {
  unsigned char* bytes;
  size_t size, offset;  // where the tensor's first element is

  Buffer(size_t size, size_t offset) : bytes(new unsigned char[size]), size(size), offset(offset) {
    std::memset(bytes, 0xff, size);
  }
  ~Buffer() { delete[] bytes; }
  void* data() const { return bytes + offset; }
};

template <class T>
T word() {
  T value;
  if (!(std::cin >> value)) simt::fail("a request broke off");
  return value;
}

// An input is announced by its size and offset, in bytes; its bytes come after the line.
Buffer announced() {
  const auto size = word<size_t>();
  return {size, word<size_t>()};
}

void receive(Buffer& buffer) {
  std::cin.read(reinterpret_cast<char*>(buffer.bytes), static_cast<std::streamsize>(buffer.size));
  if (!std::cin) simt::fail("a request broke off");
}

void end_of_line() { std::cin.ignore(1); }

void reply(const char* error, const std::vector<Buffer*>& outputs) {
  std::cout << (error ? error : "ok") << '\n';
  if (!error)
    for (const Buffer* out : outputs)
      std::cout.write(static_cast<const char*>(out->data()), static_cast<std::streamsize>(out->size - out->offset));
  std::cout.flush();
}

void attention() {
  vitkd::Attention p{};
  p.dtype = p.out_dtype = static_cast<vitkd::DType>(word<int>());
  p.batch = word<int64_t>(), p.tokens = word<int64_t>(), p.heads = word<int64_t>(), p.head_dim = word<int64_t>();
  p.scale = word<double>();
  for (auto& stride : p.qkv_stride) stride = word<int64_t>();
  Buffer qkv = announced(), out = announced();
  end_of_line();
  receive(qkv);
  p.qkv = qkv.data();
  p.out = out.data();
  reply(vitkd::cuda::attention(p, nullptr), {&out});
}

void attention_backward() {
  vitkd::AttentionBackward p{};
  p.dtype = p.out_dtype = static_cast<vitkd::DType>(word<int>());
  p.batch = word<int64_t>(), p.tokens = word<int64_t>(), p.heads = word<int64_t>(), p.head_dim = word<int64_t>();
  p.scale = word<double>();
  for (auto& stride : p.qkv_stride) stride = word<int64_t>();
  for (auto& stride : p.grad_out_stride) stride = word<int64_t>();
  Buffer qkv = announced(), grad_out = announced(), grad_qkv = announced();
  end_of_line();
  receive(qkv);
  receive(grad_out);
  p.qkv = qkv.data();
  p.grad_out = grad_out.data();
  p.grad_qkv = grad_qkv.data();
  reply(vitkd::cuda::attention_backward(p, nullptr), {&grad_qkv});
}

void kd_loss() {
  vitkd::KDLoss p{};
  p.dtype = static_cast<vitkd::DType>(word<int>());
  p.kind = static_cast<vitkd::KDKind>(word<int>());
  p.rows = word<int64_t>(), p.classes = word<int64_t>();
  p.temperature = word<double>();
  p.weight = word<double>();
  p.student_stride = word<int64_t>(), p.teacher_stride = word<int64_t>();
  Buffer student = announced(), teacher = announced();
  Buffer loss = announced(), mean = announced();  // of 0 bytes: unwanted, as a gradient
  Buffer student_grad = announced(), teacher_grad = announced();
  end_of_line();
  receive(student);
  receive(teacher);
  p.student = student.data();
  p.teacher = teacher.data();
  p.loss = loss.data();
  p.mean = mean.size ? mean.data() : nullptr;
  p.student_grad = student_grad.size ? student_grad.data() : nullptr;
  p.teacher_grad = teacher_grad.size ? teacher_grad.data() : nullptr;
  reply(vitkd::cuda::kd_loss(p, nullptr), {&loss, &mean, &student_grad, &teacher_grad});
}

void scale() {
  vitkd::Scale p{};
  p.dtype = static_cast<vitkd::DType>(word<int>());
  p.share = word<double>();
  for (auto& count : p.count) count = word<int64_t>();
  Buffer from[2] = {announced(), announced()}, factor = announced(), to[2] = {announced(), announced()};
  end_of_line();
  for (Buffer& each : from) receive(each);
  receive(factor);
  for (int i = 0; i < 2; ++i) {
    std::copy_n(static_cast<const char*>(from[i].data()), from[i].size, static_cast<char*>(to[i].data()));
    p.data[i] = to[i].data();
  }
  p.factor = static_cast<const float*>(factor.data());
  reply(vitkd::cuda::scale(p, nullptr), {&to[0], &to[1]});
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string operation;
  while (std::cin >> operation) {
    simt::schedule = static_cast<simt::Schedule>(word<int>());
    simt::random_state = 1;
    simt::max_shared = word<size_t>();
    simt::warpgroups = word<int>();
    simt::slots = word<int>();
    if (operation == "attention") attention();
    else if (operation == "attention_backward") attention_backward();
    else if (operation == "kd_loss") kd_loss();
    else if (operation == "scale") scale();
    else simt::fail("unknown request");
  }
}
