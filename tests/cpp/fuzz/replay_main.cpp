// Runs a fuzz target without a fuzzer: every file of the given folders, then `--mutations N` damaged copies of each (bytes flipped,
// cut out, doubled, truncated), chosen by `--seed S`. For continuous integration under the address sanitizer with any compiler.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

// A copy of its own size on the heap, so that reading past the end is seen.
void run(const std::string& bytes) {
  const std::vector<uint8_t> copy(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

std::string damaged(std::string bytes, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  for (size_t times = 1 + below(4); times > 0 && !bytes.empty(); --times) {
    const size_t at = below(bytes.size()), length = std::min(1 + below(8), bytes.size() - at);
    switch (below(5)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        bytes[at] = static_cast<char>(random());
        break;
      case 2:
        bytes.erase(at, length);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, length));
        break;
      default:
        bytes.resize(at);
        break;
    }
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::filesystem::path> files;
  uint64_t seed = 1;
  long mutations = 0, runs = 0;
  for (int i = 1; i < argc; ++i) {
    const bool option = i + 1 < argc && argv[i][0] == '-';
    if (option && std::strcmp(argv[i], "--seed") == 0) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (option && std::strcmp(argv[i], "--mutations") == 0) {
      mutations = std::strtol(argv[++i], nullptr, 10);
    } else if (std::filesystem::is_directory(argv[i])) {
      for (const auto& entry : std::filesystem::directory_iterator(argv[i])) files.push_back(entry.path());
    } else {
      files.push_back(argv[i]);
    }
  }
  std::sort(files.begin(), files.end());
  std::mt19937_64 random(seed);
  std::printf("seed %llu, %ld mutations of each of %zu files\n", static_cast<unsigned long long>(seed), mutations, files.size());
  for (const std::filesystem::path& path : files) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
      std::printf("%s: cannot be read\n", path.c_str());
      return 1;
    }
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    run(bytes);
    for (long i = 0; i < mutations; ++i) run(damaged(bytes, random));
    runs += 1 + mutations;
  }
  std::printf("%ld runs, no crash\n", runs);
  return files.empty() ? 1 : 0;
}
