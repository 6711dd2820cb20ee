// SPDX-License-Identifier: Apache-2.0
// The program: driver CASES [instruction set]. Exit code 0 if every check holds; sanitizers end it at a first finding.
#include <time.h>

#include "driver.h"

namespace driver {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets;
  const std::string all = gk_instruction_sets();
  for (size_t at = 0; at < all.size();) {
    const size_t end = all.find(' ', at) == std::string::npos ? all.size() : all.find(' ', at);
    sets.push_back(all.substr(at, end - at));
    at = end + 1;
  }
  return sets;
}

}  // namespace driver

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: driver CASES [instruction set]\n");
    return 2;
  }
  int used = 0;
  for (const std::string& isa : driver::instruction_sets()) {
    if (argc > 2 && isa != argv[2]) continue;
    ++used;
    const int before = driver::failures;
    std::string times;
    const auto timed = [&](const char* name, auto part) {
      const clock_t start = clock();
      part();
      times += std::string(" ") + name + " " + std::to_string((int)((clock() - start) * 1000.0 / CLOCKS_PER_SEC));
    };
    timed("products", [&] { driver::products(argv[1], isa.c_str()); });
    timed("elementwise", [&] { driver::elementwise(isa.c_str()); });
    timed("attention", [&] { driver::attention(isa.c_str()); });
    timed("logits", [&] { driver::logits(isa.c_str()); });
    timed("model", [&] { driver::model(isa.c_str()); });
    printf("%s: %s (ms:%s)\n", isa.c_str(), driver::failures == before ? "ok" : "FAILED", times.c_str());
  }
  driver::bad_arguments();
  if (!used) fprintf(stderr, "no such instruction set here: %s; there are: %s\n", argv[2], gk_instruction_sets());
  printf("%d checks, %d failed\n", driver::checks, driver::failures);
  return driver::failures || !used ? 1 : 0;
}
