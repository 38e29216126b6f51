// Files: safetensors in and out and every way they can be wrong, checkpoint folders, atomic writes, element conversion, regular
// expressions. Configurations and adapters are in config_tests.cpp.
#include <sys/resource.h>
#include <unistd.h>

#include <bit>
#include <csignal>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "io/pattern.h"
#include "io/safetensors.h"
#include "temp_folder.h"

using namespace loquetier;
namespace fs = std::filesystem;
using test::put;
using test::TempFolder;

namespace {

std::string file_of(const std::string& header, size_t data_bytes = 0) {
  const uint64_t n = header.size();
  return std::string(reinterpret_cast<const char*>(&n), 8) + header + std::string(data_bytes, '\1');
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

void refused(const std::string& header, size_t data_bytes, const std::string& why) {
  const std::string bytes = file_of(header, data_bytes);
  CHECK_THROWS(FormatError, why, SafetensorsFile::parse(bytes, "x.safetensors"));
  CHECK_THROWS(FormatError, "x.safetensors", SafetensorsFile::parse(bytes, "x.safetensors"));
}

std::string content(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& item : fs::directory_iterator(folder)) names.push_back(item.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

using Names = std::vector<std::string>;

std::string one_tensor(const std::string& name, float value) { return safetensors_bytes({{name, DType::f32, {1}, &value}}, {}); }

}  // namespace

TEST(safetensors_round_trip) {
  const std::vector<float> a = {1, -2, 3.5f, 0, 1e-40f, std::numeric_limits<float>::quiet_NaN()};
  const std::vector<uint16_t> b = {0x3f80, 0x7fc1, 1};
  const std::vector<int64_t> c = {-7};
  const std::string bytes = safetensors_bytes({{"b \"quoted\" \xc3\xa9", DType::bf16, {3}, b.data()},
                                               {"a", DType::f32, {2, 3}, a.data()},
                                               {"scalar", DType::i64, {}, c.data()},
                                               {"empty", DType::u8, {4, 0}, nullptr}},
                                              {{"format", "pt"}, {"n", "1\n"}});
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  CHECK_EQ(header % 8, 0u);
  CHECK_EQ(bytes.size(), 8 + header + 6 + 24 + 8);

  TempFolder folder;
  write_file_atomically(folder / "x.safetensors", bytes);
  const SafetensorsFile file = SafetensorsFile::open(folder / "x.safetensors");
  CHECK_EQ(file.tensors().size(), 4u);
  CHECK_EQ(file.metadata().at("format"), "pt");
  CHECK_EQ(file.metadata().at("n"), "1\n");
  CHECK(file.at("a").shape == std::vector<int64_t>({2, 3}));
  CHECK(std::memcmp(file.at("a").data, a.data(), 24) == 0);
  CHECK(file.at("b \"quoted\" \xc3\xa9").dtype == DType::bf16);
  CHECK(std::memcmp(file.at("b \"quoted\" \xc3\xa9").data, b.data(), 6) == 0);
  CHECK(file.at("scalar").shape.empty());
  CHECK_EQ(file.at("scalar").bytes, 8u);
  CHECK_EQ(file.at("empty").bytes, 0u);
  CHECK(file.mapping() != nullptr);
  CHECK_THROWS(FormatError, "'missing': no such tensor", file.at("missing"));
  CHECK_THROWS(NotFound, "none.safetensors: no such file", SafetensorsFile::open(folder / "none.safetensors"));
  CHECK_THROWS(FormatError, "expected a regular file", SafetensorsFile::open(folder.path()));
}

TEST(safetensors_without_tensors) {
  const std::string bytes = safetensors_bytes({}, {});
  CHECK_EQ(bytes.size(), 16u);
  CHECK(SafetensorsFile::parse(bytes, "x").tensors().empty());
  const std::string described = safetensors_bytes({}, {{"a", "b"}});
  CHECK_EQ(SafetensorsFile::parse(described, "x").metadata().size(), 1u);
}

TEST(safetensors_other_dtypes_are_listed) {
  const std::string bytes = file_of("{" + entry("d", "F64", "[2]", "[0,16]") + "," + entry("f", "F16", "[1]", "[16,18]") + "," +
                                        entry("q", "F8_E4M3", "[3]", "[18,21]") + "}",
                                    21);
  const SafetensorsFile file = SafetensorsFile::parse(bytes, "x");
  CHECK_EQ(file.tensors().size(), 1u);
  CHECK_EQ(file.unsupported().at("d"), "F64");
  CHECK_EQ(file.at("f").bytes, 2u);
  CHECK_THROWS(FormatError, "'q': dtype: expected F32, F16, BF16, I32, I64 or U8, got F8_E4M3", file.at("q"));
}

TEST(safetensors_hostile_headers) {
  CHECK_THROWS(FormatError, "at least 8 bytes, got 0", SafetensorsFile::parse("", "x"));
  CHECK_THROWS(FormatError, "at least 8 bytes, got 7", SafetensorsFile::parse("1234567", "x"));
  for (uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, uint64_t{1} << 62, UINT64_MAX}) {
    const std::string bytes = std::string(reinterpret_cast<const char*>(&length), 8) + "{}";
    CHECK_THROWS(FormatError, "header length: expected at most 2", SafetensorsFile::parse(bytes, "x"));
  }
  refused("", 0, "expected JSON beginning with '{'");
  refused(" {}", 0, "expected JSON beginning with '{'");
  refused("[]", 0, "expected JSON beginning with '{'");
  refused("{", 0, "not valid JSON");
  refused("{}}", 0, "not valid JSON");
  refused(std::string("{}\0 ", 4), 0, "zero byte");
  refused("{\"\xff\":1}", 0, "not valid JSON");
  refused("{\"a\":1}", 0, "'a': expected an object, got the number 1");
  refused("{\"a\":[]}", 0, "'a': expected an object, got a list");
  refused("{\"a\":null}", 0, "'a': expected an object, got null");
  refused("{\"a\":{\"dtype\":{}}}", 0, "'a': dtype: expected a string, got an object");
  refused("{\"a\":{\"dtype\":7}}", 0, "'a': dtype: expected a string, got the number 7");
  refused("{\"a\":{\"dtype\":\"F32\"}}", 0, "'a': shape is missing");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 0, "'a': data_offsets is missing");
  refused("{\"a\":{\"shape\":[],\"data_offsets\":[0,0]}}", 0, "'a': dtype is missing");
  refused("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0, "'a': key 'dtype' appears twice");
  refused("{\"a\":{\"strides\":[1]}}", 0, "'a': unknown key 'strides'");
  refused("{" + entry("a", "F32", "[1]", "[0,4]") + "," + entry("a", "F32", "[1]", "[4,8]") + "}", 8, "'a' appears twice");
  refused("{\"__metadata__\":{\"k\":1}}", 0, "__metadata__: 'k': expected a string, got the number 1");
  refused("{\"__metadata__\":{\"k\":{}}}", 0, "__metadata__: 'k': expected a string, got an object");
  refused("{\"__metadata__\":[]}", 0, "__metadata__: expected an object, got a list");
  refused("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, "__metadata__: key 'k' appears twice");
  refused("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "'__metadata__' appears twice");
  refused(std::string(200'000, '{'), 0, "not valid JSON");
  std::string deep = "{\"a\":";
  for (int i = 0; i < 100'000; ++i) deep += "[";
  refused(deep, 0, "'a': expected an object, got a list");
}

TEST(safetensors_hostile_layouts) {
  const auto one = [](const std::string& shape, const std::string& offsets) {
    return "{" + entry("a", "F32", shape, offsets) + "}";
  };
  refused(one("[-1]", "[0,4]"), 4, "'a': shape: expected a list of non-negative integers, got the negative number -1");
  refused(one("[1.0]", "[0,4]"), 4, "shape: expected a list of non-negative integers, got the number 1.0");
  refused(one("[\"1\"]", "[0,4]"), 4, "got a string");
  refused(one("[[1]]", "[0,4]"), 4, "got a list");
  refused(one("[1]", "[0]"), 4, "data_offsets: expected [begin, end], got 1 numbers");
  refused(one("[1]", "[0,4,8]"), 4, "data_offsets: too many numbers");
  refused(one("[1]", "[-4,4]"), 4, "data_offsets: expected a list of non-negative integers, got the negative number -4");
  refused(one("[1]", "[4,0]"), 4, "data_offsets: expected begin <= end, got [4, 0]");
  refused(one("[1]", "[0,8]"), 4, "expected an end of at most 4");
  refused(one("[1]", "[0,18446744073709551615]"), 4, "expected an end of at most 4");
  refused(one("[1]", "[0,18446744073709551620]"), 4, "got the number 18446744073709551620");
  refused(one("[18446744073709551615]", "[0,4]"), 4, "dimension 18446744073709551615 is too large");
  refused(one("[4611686018427387904,4]", "[0,4]"), 4, "expected more than 2^64 bytes for F32");
  refused(one("[4611686018427387905]", "[0,4]"), 4, "expected more than 2^64 bytes for F32");
  refused(one("[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "too many numbers");
  refused(one("[2]", "[0,4]"), 4, "expected 8 bytes for F32 [2], got 4 from data_offsets");
  refused(one("[0]", "[0,4]"), 4, "expected 0 bytes for F32 [0], got 4");
  refused(one("[1]", "[0,4]"), 5, "expected 4 bytes of data after the header, got 5");
  refused(one("[1]", "[1,5]"), 5, "expected to begin at 0");
  refused("{}", 1, "expected 0 bytes of data");
  const auto two = [](const std::string& first, const std::string& second) {
    return "{" + entry("a", "F32", "[1]", first) + "," + entry("b", "F32", "[1]", second) + "}";
  };
  refused(two("[0,4]", "[2,6]"), 6, "'b': data_offsets: overlaps with 'a'");
  refused(two("[0,4]", "[0,4]"), 4, "overlaps with");
  refused(two("[4,8]", "[2,6]"), 8, "expected to begin at 0");
  refused(two("[0,4]", "[5,9]"), 9, "'b': data_offsets: expected to begin at 4");
  const std::string good = file_of(two("[4,8]", "[0,4]"), 8);
  CHECK_EQ(SafetensorsFile::parse(good, "x").tensors().size(), 2u);  // any order
}

TEST(safetensors_truncated_anywhere) {
  const std::vector<float> values(6, 1.0f);
  const std::string bytes = safetensors_bytes({{"a", DType::f32, {2, 3}, values.data()}}, {{"k", "v"}});
  for (size_t n = 0; n < bytes.size(); ++n) {
    const std::string cut = bytes.substr(0, n);
    CHECK_THROWS(FormatError, "cut", SafetensorsFile::parse(cut, "cut"));
  }
}

TEST(safetensors_writer_refuses) {
  const float value = 1;
  CHECK_THROWS(InvalidArgument, "'a': expected a name of its own",
               safetensors_bytes({{"a", DType::f32, {1}, &value}, {"a", DType::f32, {1}, &value}}, {}));
  CHECK_THROWS(InvalidArgument, "'__metadata__'", safetensors_bytes({{"__metadata__", DType::f32, {1}, &value}}, {}));
  CHECK_THROWS(InvalidArgument, "shape: expected at most 16 non-negative",
               safetensors_bytes({{"a", DType::f32, {-1}, &value}}, {}));
  CHECK_THROWS(InvalidArgument, "expected data, got none", safetensors_bytes({{"a", DType::f32, {1}, nullptr}}, {}));
  CHECK_THROWS(InvalidArgument, "UTF-8", safetensors_bytes({{"\xff", DType::f32, {1}, &value}}, {}));
}

TEST(checkpoint_folder) {
  TempFolder folder;
  CHECK_THROWS(NotFound, "no such folder", open_checkpoint(folder / "none"));
  CHECK_THROWS(NotFound, "neither", open_checkpoint(folder.path()));
  put(folder / "pytorch_model.bin", "x");
  CHECK_THROWS(NotFound, "safe_serialization=True", open_checkpoint(folder.path()));

  const auto index = [&](const std::string& map) {
    put(folder / "model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":" + map + "}");
  };
  put(folder / "s1.safetensors", one_tensor("a", 1));
  put(folder / "s2.safetensors", one_tensor("b", 2));
  index("{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}");
  const CheckpointTensors sharded = open_checkpoint(folder.path());
  CHECK_EQ(sharded.tensors.size(), 2u);
  CHECK_EQ(sharded.mappings.size(), 2u);
  float b = 0;
  std::memcpy(&b, sharded.at("b").data, 4);
  CHECK_EQ(b, 2.0f);
  CHECK_THROWS(FormatError, "'c': no such tensor", sharded.at("c"));

  index("{\"a\":\"s1.safetensors\",\"b\":\"s1.safetensors\"}");
  CHECK_THROWS(FormatError, "s1.safetensors: 'b': no such tensor, but model.safetensors.index.json puts it there",
               open_checkpoint(folder.path()));
  index("{\"a\":\"s1.safetensors\",\"b\":\"s3.safetensors\"}");
  CHECK_THROWS(NotFound, "s3.safetensors: no such file, but", open_checkpoint(folder.path()));
  index("{\"a\":\"../s1.safetensors\"}");
  CHECK_THROWS(FormatError, "expected a file of the same folder, got '../s1.safetensors'", open_checkpoint(folder.path()));
  index("{\"a\":7}");
  CHECK_THROWS(FormatError, "'a': expected a file name", open_checkpoint(folder.path()));
  index("{}");
  CHECK_THROWS(FormatError, "weight_map: expected an object", open_checkpoint(folder.path()));
  index("{\"a\":\"s1.safetensors\",\"a\":\"s2.safetensors\"}");
  CHECK_THROWS(FormatError, "key 'a' appears twice", open_checkpoint(folder.path()));
  const float value = 1;
  put(folder / "s1.safetensors", safetensors_bytes({{"a", DType::f32, {1}, &value}, {"extra", DType::f32, {1}, &value}}, {}));
  index("{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}");
  CHECK_THROWS(FormatError, "'extra': a tensor that model.safetensors.index.json does not put there",
               open_checkpoint(folder.path()));

  put(folder / "model.safetensors", file_of("{" + entry("d", "F64", "[1]", "[0,8]") + "}", 8));  // one file wins over the index
  const CheckpointTensors single = open_checkpoint(folder.path());
  CHECK_THROWS(FormatError, "'d': dtype: expected F32, F16, BF16, I32, I64 or U8, got F64", single.at("d"));
}

TEST(text_files) {
  TempFolder folder;
  put(folder / "t", "hello");
  CHECK_EQ(read_text_file(folder / "t"), "hello");
  CHECK_THROWS(FormatError, "at most 4 bytes, got 5", read_text_file(folder / "t", 4));
  CHECK_THROWS(NotFound, "no such file", read_text_file(folder / "u"));
  CHECK_THROWS(NotFound, "no such file", read_text_file(folder / "t/u"));
  put(folder / "empty", "");
  CHECK_EQ(read_text_file(folder / "empty"), "");
}

TEST(atomic_files) {
  TempFolder folder;
  write_file_atomically(folder / "f", "one");
  CHECK_EQ(content(folder / "f"), "one");
  write_file_atomically(folder / "f", std::string("t\0wo", 4));
  CHECK_EQ(content(folder / "f"), std::string("t\0wo", 4));
  CHECK(names_in(folder.path()) == Names{"f"});
  fs::create_symlink(folder / "f", folder / "link");
  write_file_atomically(folder / "link", "three");
  CHECK(fs::is_symlink(folder / "link"));
  CHECK_EQ(content(folder / "f"), "three");
  CHECK_THROWS(NotFound, "no such folder", write_file_atomically(folder / "none" / "f", "x"));
  CHECK_THROWS(InvalidArgument, "got a folder", write_file_atomically(folder.path(), "x"));
  CHECK(names_in(folder.path()) == (Names{"f", "link"}));
}

TEST(atomic_folders) {
  TempFolder folder;
  write_folder_atomically(folder / "deep" / "a", {{"x", "1"}, {"y", "2"}});
  CHECK_EQ(content(folder / "deep/a/y"), "2");
  write_folder_atomically(folder / "deep" / "a" / "", {{"x", "3"}});  // a trailing slash
  CHECK(names_in(folder / "deep/a") == Names{"x"});
  CHECK_EQ(content(folder / "deep/a/x"), "3");

  put(folder / "deep/a/mine", "m");
  write_folder_atomically(folder / "deep/a", {{"x", "4"}, {"z", "5"}}, OtherFiles::keep);
  CHECK(names_in(folder / "deep/a") == (Names{"mine", "x", "z"}));
  CHECK_EQ(content(folder / "deep/a/mine"), "m");
  CHECK_EQ(content(folder / "deep/a/x"), "4");

  fs::create_directory_symlink(folder / "deep/a", folder / "link");
  write_folder_atomically(folder / "link", {{"x", "5"}}, OtherFiles::keep);
  CHECK(fs::is_symlink(folder / "link"));
  CHECK_EQ(content(folder / "deep/a/x"), "5");
  CHECK(names_in(folder / "deep") == Names{"a"});

  // Folders that are not ours stay as they are.
  fs::create_directory(folder / "other");
  write_folder_atomically(folder / "other", {{"x", "1"}});  // empty: fine
  fs::remove(folder / "other/x");
  put(folder / "other/precious", "p");
  CHECK_THROWS(InvalidArgument, "got a folder of other files", write_folder_atomically(folder / "other", {{"x", "1"}}));
  fs::create_directory(folder / "other/sub");
  CHECK_THROWS(InvalidArgument, "subfolder 'sub'", write_folder_atomically(folder / "other", {{"x", "1"}}, OtherFiles::keep));
  CHECK(names_in(folder / "other") == (Names{"precious", "sub"}));
  CHECK_THROWS(InvalidArgument, "expected a folder, got a file", write_folder_atomically(folder / "other/precious", {{"x", "1"}}));
  for (const char* name : {"", ".", "..", "a/b"})
    CHECK_THROWS(InvalidArgument, "plain file names", write_folder_atomically(folder / "n", {{name, "1"}}));
  CHECK_THROWS(InvalidArgument, "got none", write_folder_atomically(folder / "n", {}));
  CHECK(names_in(folder.path()) == (Names{"deep", "link", "other"}));
}

TEST(atomic_writes_survive_a_failure) {
  TempFolder folder;
  write_folder_atomically(folder / "a", {{"x", "old"}, {"y", "old"}});
  write_file_atomically(folder / "f", "old");
  // A limit on file sizes makes the second file fail half-way, as a full disk does.
  rlimit before{}, limit{};
  getrlimit(RLIMIT_FSIZE, &before);
  limit = before;
  limit.rlim_cur = 4096;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &limit);
  CHECK_THROWS(Error, "cannot write", write_folder_atomically(folder / "a", {{"x", "new"}, {"y", std::string(10000, 'n')}}));
  CHECK_THROWS(Error, "cannot write", write_folder_atomically(folder / "b", {{"y", std::string(10000, 'n')}}));
  CHECK_THROWS(Error, "cannot write", write_file_atomically(folder / "f", std::string(10000, 'n')));
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_EQ(content(folder / "a/x"), "old");
  CHECK_EQ(content(folder / "a/y"), "old");
  CHECK_EQ(content(folder / "f"), "old");
  CHECK(names_in(folder.path()) == (Names{"a", "f"}));  // nothing temporary is left
  if (::geteuid() != 0) {
    fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec);
    CHECK_THROWS(Error, "cannot be created", write_file_atomically(folder / "f", "new"));
    CHECK_THROWS(Error, "cannot be", write_folder_atomically(folder / "a", {{"x", "new"}}));
    fs::permissions(folder.path(), fs::perms::owner_all);
  }
  CHECK_EQ(content(folder / "a/x"), "old");
}

namespace {

// Rounding by definition, in double: the nearest of the two neighbours, ties to the even one. Only for finite values.
template <class Widen>
uint16_t nearest(float value, uint16_t infinity, Widen widen) {
  uint16_t best = 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  uint16_t low = 0, high = infinity;  // binary search: magnitudes grow with their bits
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (widen(middle) <= magnitude ? low : high) = middle;
  }
  // Infinity stands where the next finite number would be.
  const double top =
      high == infinity ? 2 * widen(static_cast<uint16_t>(infinity - 1)) - widen(static_cast<uint16_t>(infinity - 2)) : widen(high);
  const double below = magnitude - widen(low), above = top - magnitude;
  best = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(best | (std::signbit(value) ? 0x8000 : 0));
}

float convert_one(uint16_t bits, DType from) {
  float value = 0;
  convert_elements(&bits, from, &value, DType::f32, 1);
  return value;
}

uint16_t convert_one(float value, DType to) {
  uint16_t bits = 0;
  convert_elements(&value, DType::f32, &bits, to, 1);
  return bits;
}

}  // namespace

TEST(convert_every_half_value) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    for (DType dtype : {DType::f16, DType::bf16}) {
      const int exponent_bits = dtype == DType::f16 ? 5 : 8, mantissa_bits = 15 - exponent_bits,
                bias = (1 << (exponent_bits - 1)) - 1;
      const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
      const float value = convert_one(bits, dtype);
      if (exponent == (1 << exponent_bits) - 1) {
        if (mantissa != 0) {
          CHECK(std::isnan(value));
          const float back = convert_one(convert_one(value, dtype), dtype);
          CHECK(std::isnan(back) && std::signbit(back) == ((bits & 0x8000) != 0));
          continue;
        }
        CHECK(std::isinf(value));
      } else {
        const double expected = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                              : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
        CHECK(value == static_cast<float>(bits & 0x8000 ? -expected : expected) && std::signbit(value) == ((bits & 0x8000) != 0));
      }
      CHECK_EQ(convert_one(value, dtype), bits);
    }
  }
}

TEST(convert_rounds_to_nearest_even) {
  const uint64_t seed = std::stoull(test::option("--seed", "1"));
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const auto half = [](uint16_t bits) { return static_cast<double>(convert_one(bits, DType::f16)); };
  const auto brain = [](uint16_t bits) { return static_cast<double>(convert_one(bits, DType::bf16)); };
  const auto check = [&](float value) {
    if (!std::isfinite(value)) return;
    CHECK_EQ(convert_one(value, DType::f16), nearest(value, 0x7c00, half));
    CHECK_EQ(convert_one(value, DType::bf16), nearest(value, 0x7f80, brain));
  };
  for (int i = 0; i < 20000; ++i) {
    check(std::bit_cast<float>(static_cast<uint32_t>(random())));
    // Near the range of halves, and exactly between two of them.
    check(std::ldexp(static_cast<float>(static_cast<int32_t>(random() % 8192) - 4096), static_cast<int>(random() % 44) - 36));
    const auto bits = static_cast<uint16_t>(random());
    if ((bits & 0x7c00) != 0x7c00) check(static_cast<float>((half(bits) + half(static_cast<uint16_t>(bits + 1))) / 2));
  }
  CHECK_EQ(convert_one(65519.996f, DType::f16), 0x7bff);
  CHECK_EQ(convert_one(65520.0f, DType::f16), 0x7c00);
  CHECK_EQ(convert_one(std::ldexp(1.0f, -25), DType::f16), 0);  // a tie with zero
  CHECK_EQ(convert_one(std::ldexp(1.0001f, -25), DType::f16), 1);
  CHECK_EQ(convert_one(std::numeric_limits<float>::max(), DType::bf16), 0x7f80);
}

TEST(convert_arrays) {
  const std::vector<float> values = {0.0f, -1.5f, 3.0f, 1e30f, std::numeric_limits<float>::infinity()};
  std::vector<std::byte> unaligned(1 + 2 * values.size());
  convert_elements(values.data(), DType::f32, unaligned.data() + 1, DType::bf16, 5);
  std::vector<uint16_t> halves(6, 0xdead);
  convert_elements(unaligned.data() + 1, DType::bf16, halves.data(), DType::f16, 5);
  CHECK(halves == std::vector<uint16_t>({0, 0xbe00, 0x4200, 0x7c00, 0x7c00, 0xdead}));
  std::vector<float> back(5);
  convert_elements(halves.data(), DType::f16, back.data(), DType::f32, 5);
  CHECK_EQ(back[1], -1.5f);
  convert_elements(halves.data(), DType::f16, unaligned.data(), DType::bf16, 5);
  CHECK_EQ(static_cast<int>(unaligned[3]), 0xbf);
  convert_elements(values.data(), DType::f32, back.data(), DType::f32, 5);
  CHECK(std::memcmp(back.data(), values.data(), 20) == 0);
  convert_elements(nullptr, DType::f32, nullptr, DType::f16, 0);
  CHECK_THROWS(InvalidArgument, "[convert] source dtype: expected f32, f16 or bf16, got i64",
               convert_elements(back.data(), DType::i64, back.data(), DType::f32, 1));
  CHECK_THROWS(InvalidArgument, "[convert] target dtype", convert_elements(back.data(), DType::f32, back.data(), DType::u8, 1));
}

TEST(patterns_match_as_python_does) {
  struct Case {
    const char* pattern;
    const char* text;
    bool full;    // re.fullmatch
    bool prefix;  // re.match
  };
  const Case cases[] = {{"q_proj", "q_proj", true, true},
                        {"q_proj", "xq_proj", false, false},
                        {".*q_proj", "a.b.q_proj", true, true},
                        {"(q|k)_proj", "k_proj", true, true},
                        {"", "", true, true},
                        {"", "a", false, true},
                        {"a|", "", true, true},
                        {"a*?b+", "aabb", true, true},
                        {R"(model\.layers\.(0|1[0-5])\.self_attn\.[qv]_proj)", "model.layers.12.self_attn.v_proj", true, true},
                        {R"(model\.layers\.(0|1[0-5])\.self_attn\.[qv]_proj)", "model.layers.16.self_attn.v_proj", false, false},
                        {R"(^(?!.*mlp).*_proj$)", "model.layers.0.self_attn.q_proj", true, true},
                        {R"(^(?!.*mlp).*_proj$)", "model.layers.0.mlp.up_proj", false, false},
                        {R"(.*\.(?=self_attn)\w+\.q_proj)", "layers.0.self_attn.q_proj", true, true},
                        {R"(.*\.(?=mlp)\w+\.q_proj)", "layers.0.self_attn.q_proj", false, false},
                        {R"(\blayers\b.*)", "layers.1", true, true},
                        {R"(.*\bayers.*)", "layers.1", false, false},
                        {R"(.*\Bayers.*)", "layers.1", true, true},
                        {R"([\d]{1,}\.)", "123.", true, true},
                        {R"(\d{2})", "1", false, false},
                        {R"(\d{2})", "123", false, true},
                        {"a{,2}b", "aab", true, true},
                        {"a{,2}b", "aaab", false, false},
                        {"a{2,3}", "aaaa", false, true},
                        {"a{x}", "a{x}", true, true},
                        {"a{}", "a{}", true, true},
                        {"[]a]+", "]a", true, true},
                        {"[^]a]", "b", true, true},
                        {"[a-c-]", "-", true, true},
                        {R"([\w.-]+)", "a.b-c", true, true},
                        {"(?P<name>a)b", "ab", true, true},
                        {"(?:ab)*", "abab", true, true},
                        {"(a*)*", "aaa", true, true},
                        {"(a*)*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false, false},
                        {"a$b", "ab", false, false},
                        {"(^a|b)c", "ac", true, true},
                        {".", "\n", false, false},
                        {R"(\S\s\S)", "a b", true, true},
                        {R"(\.)", "x", false, false},
                        {"(?=a)", "a", false, true},
                        {"(?!a)b|ac", "ac", true, true},
                        {"()", "", true, true},
                        {"(|a)+", "aaa", true, true}};
  for (const Case& c : cases) {
    const Pattern pattern(c.pattern, "test");
    if (pattern.full_match(c.text) != c.full || pattern.prefix_match(c.text) != c.prefix)
      std::printf("pattern %s on %s\n", c.pattern, c.text);
    CHECK_EQ(pattern.full_match(c.text), c.full);
    CHECK_EQ(pattern.prefix_match(c.text), c.prefix);
  }
}

TEST(patterns_refused) {
  const std::pair<const char*, const char*> cases[] = {{"(a", "missing ')'"},
                                                       {"a)", "unbalanced ')'"},
                                                       {"[a", "missing ']'"},
                                                       {"*a", "nothing to repeat"},
                                                       {"a**", "multiple repeat"},
                                                       {"^*", "nothing to repeat"},
                                                       {"a++", "possessive"},
                                                       {"(?<=a)b", "lookbehind"},
                                                       {"(?<!a)b", "lookbehind"},
                                                       {R"((a)\1)", "back-references"},
                                                       {"(?i)a", "only (?:"},
                                                       {"(?>a)", "only (?:"},
                                                       {"(?P=a)", "only (?:"},
                                                       {"a{3,2}", "min repeat"},
                                                       {"a{99999}", "more than 4096 repetitions"},
                                                       {"[z-a]", "bad character range"},
                                                       {R"(\y)", "escape \\y"},
                                                       {"a\\", "a backslash at the end"},
                                                       {"(?P<>a)", "bad group name"},
                                                       {"((a{4000}){4000}){4000}", "more than 16384 steps"},
                                                       {"((((){4000}){4000}){4000}){4000}", "too many repetitions"},
                                                       {R"([\d-z])", "bad character range"}};
  for (const auto& [pattern, why] : cases) {
    const std::string text = pattern, reason = why;
    CHECK_THROWS(InvalidArgument, reason, Pattern(text, "test"));
    CHECK_THROWS(InvalidArgument, "[test] expression", Pattern(text, "test"));
  }
  CHECK_THROWS(InvalidArgument, "groups nested deeper", Pattern(std::string(100, '('), "test"));
  CHECK_THROWS(InvalidArgument, "at most 16384 characters", Pattern(std::string(20000, 'a'), "test"));
}
