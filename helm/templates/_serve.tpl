{{/* The arguments of service.app:build: settings of m3serve. Unset ones keep m3serve's defaults. */}}
{{- define "m3serve.args" -}}
{{- $engine := .Values.engine -}}
{{- $cache := $engine.indexCache -}}
{{- $drain := include "m3serve.drain" . | fromYaml -}}
{{- $args := dict
  "model" .Values.model.path
  "served_model_name" (include "m3serve.modelName" .)
  "replicas" $engine.replicas
  "min_replicas" $engine.minReplicas
  "max_replicas" $engine.maxReplicas
  "tensor_parallel_size" $engine.tensorParallelSize
  "backend" $engine.backend
  "dtype" $engine.dtype
  "max_model_len" $engine.maxModelLen
  "max_num_seqs" $engine.maxNumSeqs
  "max_num_batched_tokens" $engine.maxNumBatchedTokens
  "memory_fraction" $engine.memoryFraction
  "kv_cache_dtype" $engine.kvCacheDtype
  "index_cache_dtype" $engine.indexCacheDtype
  "enable_prefix_caching" $engine.enablePrefixCaching
  "use_index_cache" $cache.enabled
  "index_topk_freq" $cache.topkFreq
  "index_skip_topk_offset" $cache.skipTopkOffset
  "index_topk_pattern" $cache.topkPattern
  "index_reuse" $cache.reuse
  "ingress_replicas" .Values.http.replicas
  "graceful_shutdown_timeout_s" (int64 $drain.replicaShutdown)
-}}
{{- if .Values.monitoring.exporter.enabled -}}
{{- $_ := set $args "metrics_dir" .Values.monitoring.exporter.directory -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $args "api_key_file" (printf "%s/keys" (include "m3serve.apiKeysPath" .)) -}}
{{- end -}}
{{- $set := dict -}}
{{- range $name, $value := merge $args .Values.settings -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $set $name $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $set -}}
{{- end -}}

{{- define "m3serve.apiKeysPath" -}}
/etc/m3serve/api-keys
{{- end -}}

{{/* No request_timeout_s: it would end long generations. */}}
{{- define "m3serve.serveConfig" -}}
{{- $application := dict
  "name" .Values.serve.applicationName
  "route_prefix" "/"
  "import_path" "service.app:build"
  "args" (include "m3serve.args" . | fromYaml)
-}}
{{- dict
  "proxy_location" "EveryNode"
  "http_options" (dict
    "host" "0.0.0.0"
    "port" .Values.http.port
    "keep_alive_timeout_s" .Values.http.keepAliveTimeoutSeconds)
  "logging_config" (dict
    "log_level" .Values.serve.logLevel
    "enable_access_log" .Values.serve.accessLog)
  "applications" (list $application)
  | toYaml -}}
{{- end -}}
