// The pybind11 module fastgan._C. Importing it registers the CPU kernels of torch.ops.fastgan (each *_op.cpp
// does so in a static constructor); what it exports itself is only about the build and the machine.
#include <pybind11/pybind11.h>

#include <chrono>
#include <string>
#include <thread>

#include "common/capability.h"
#include "common/pool.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace {

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const char* const* each = fastgan::available_capabilities(); *each; ++each) names.emplace_back(*each);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastgan's compiled kernels; see torch.ops.fastgan for the operators";
  m.def("capability", [] { return std::string(fastgan::capability_name(fastgan::capability())); });
  m.def("set_capability", [](const std::string& name) { fastgan::set_capability(name.c_str()); });
  m.def("available_capabilities", [] {
    py::tuple names(available().size());
    size_t i = 0;
    for (const std::string& each : available()) names[i++] = py::str(each);
    return names;
  });
  // How many different threads run a loop of `count` short sleeps: what tests use to see that loops are
  // parallel.
  m.def("threads_used", [](int count) {
    std::vector<std::thread::id> ids(static_cast<size_t>(count));
    {
      py::gil_scoped_release release;
      fastgan::parallel_for(fastgan::torch_threads(), count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
          ids[static_cast<size_t>(i)] = std::this_thread::get_id();
        }
      });
    }
    std::vector<std::thread::id> unique;
    for (std::thread::id each : ids) {
      bool seen = false;
      for (std::thread::id other : unique) seen = seen || other == each;
      if (!seen) unique.push_back(each);
    }
    return unique.size();
  });
  m.def("empty_pool", &fastgan::empty_pool);
  // (bytes in use, bytes kept for the next taker)
  m.def("pool_state", [] {
    const fastgan::PoolState state = fastgan::pool_state();
    return py::make_tuple(state.used, state.kept);
  });
  m.attr("compiler") = __VERSION__;
}
